# docker build -t mezzotint . && docker run --rm --gpus all -v "$PWD:/work" mezzotint demo
FROM pytorch/pytorch:2.11.0-cuda13.0-cudnn9-runtime
WORKDIR /opt/mezzotint
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY demo_model/pyproject.toml ./demo_model/
RUN pip install --no-cache-dir . ./demo_model
WORKDIR /work
ENTRYPOINT ["mezzotint"]
