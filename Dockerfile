# distlora in a container: `docker build --target cuda -t distlora .`, or `--target cpu` for an image without CUDA (docs/install.md).
FROM python:3.12-slim AS system
# Triton and train.compile call a compiler at run time; git serves the hub's clients.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
WORKDIR /opt/distlora
COPY . .

FROM system AS cpu
# hadolint ignore=DL3013
RUN pip install torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install '.[bnb,demo,eval,gguf,sweep]'
WORKDIR /work
ENTRYPOINT ["distlora"]

# PyPI's torch carries the CUDA libraries; the host needs the NVIDIA driver and its container toolkit.
FROM system AS cuda
# hadolint ignore=DL3013
RUN pip install '.[all]'
WORKDIR /work
ENTRYPOINT ["distlora"]
