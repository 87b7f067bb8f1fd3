"""Rules that rename diffusers' tensors to the names in the makers' own files.

They are written by hand from the makers' code, so that they check diffusers' converters.
"""

NORMS = [
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
]
ATTENTION = [
    (r"attn\.to_(q|k|v)\.", "img_attn.qkv."),
    (r"attn\.add_(q|k|v)_proj\.", "txt_attn.qkv."),
    (r"attn\.to_out\.0\.", "img_attn.proj."),
    (r"attn\.to_add_out\.", "txt_attn.proj."),
]
ENDS = [
    (r"^x_embedder", "img_in"),
    (r"^context_embedder", "txt_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"embedder\.linear_1", "embedder.in_layer"),
    (r"embedder\.linear_2", "embedder.out_layer"),
    (r"^time_\w+_embed\.timestep_embedder", "time_in"),
    (r"^time_\w+_embed\.guidance_embedder", "guidance_in"),
    (r"^time_\w+_embed\.text_embedder", "vector_in"),
    (r"^transformer_blocks\.", "double_blocks."),
]
TO_ORIGINAL: dict[str, list[tuple[str, str]]] = {
    "flux1": [
        (
            r"^(single_)transformer_(blocks\.\d+\.)attn\.norm_q\.weight",
            r"\1\2norm.query_norm.scale",
        ),
        (r"^(single_)transformer_(blocks\.\d+\.)attn\.norm_k\.weight", r"\1\2norm.key_norm.scale"),
        (r"^(single_)transformer_(blocks\.\d+\.)(attn\.to_(q|k|v)|proj_mlp)\.", r"\1\2linear1."),
        (r"^(single_)transformer_(blocks\.\d+\.)proj_out\.", r"\1\2linear2."),
        (r"^(single_)transformer_(blocks\.\d+\.)norm\.linear\.", r"\1\2modulation.lin."),
        *NORMS,
        *ATTENTION,
        (r"norm1\.linear", "img_mod.lin"),
        (r"norm1_context\.linear", "txt_mod.lin"),
        (r"\.ff\.net\.0\.proj", ".img_mlp.0"),
        (r"\.ff\.net\.2", ".img_mlp.2"),
        (r"\.ff_context\.net\.0\.proj", ".txt_mlp.0"),
        (r"\.ff_context\.net\.2", ".txt_mlp.2"),
        *ENDS,
    ],
    "flux2": [
        (
            r"^(single_)transformer_(blocks\.\d+\.)attn\.norm_q\.weight",
            r"\1\2norm.query_norm.scale",
        ),
        (r"^(single_)transformer_(blocks\.\d+\.)attn\.norm_k\.weight", r"\1\2norm.key_norm.scale"),
        (r"^(single_)transformer_(blocks\.\d+\.)attn\.to_qkv_mlp_proj\.", r"\1\2linear1."),
        (r"^(single_)transformer_(blocks\.\d+\.)attn\.to_out\.", r"\1\2linear2."),
        *NORMS,
        *ATTENTION,
        (r"modulation(_\w+)?\.linear", r"modulation\1.lin"),
        (r"\.ff\.linear_in", ".img_mlp.0"),
        (r"\.ff\.linear_out", ".img_mlp.2"),
        (r"\.ff_context\.linear_in", ".txt_mlp.0"),
        (r"\.ff_context\.linear_out", ".txt_mlp.2"),
        *ENDS,
    ],
    "wan2.2": [
        (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
        (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
        (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
        (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
        (r"^condition_embedder\.time_proj", "time_projection.1"),
        (r"^scale_shift_table", "head.modulation"),
        (r"^proj_out", "head.head"),
        (r"scale_shift_table", "modulation"),
        (r"attn1\.", "self_attn."),
        (r"attn2\.", "cross_attn."),
        (r"\.to_(q|k|v)\.", r".\1."),
        (r"\.to_out\.0\.", ".o."),
        (r"ffn\.net\.0\.proj", "ffn.0"),
        (r"ffn\.net\.2", "ffn.2"),
        (r"\.norm2\.", ".norm3."),
    ],
    "z": [
        (r"^all_x_embedder\.2-1", "x_embedder"),
        (r"^all_final_layer\.2-1", "final_layer"),
        (r"attention\.to_(q|k|v)\.", "attention.qkv."),
        (r"attention\.to_out\.0\.", "attention.out."),
        (r"attention\.norm_(q|k)\.", r"attention.\1_norm."),
        (r"^", "model.diffusion_model."),
    ],
    "qwen": [(r"^", "model.diffusion_model.")],
}
