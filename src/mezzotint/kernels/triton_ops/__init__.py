"""Our own GPU kernels, in Triton. Each file registers its operations as torch.ops.mezzotint.* when it is imported.

Nothing else imports Triton, which a machine without a GPU need not have.
"""
