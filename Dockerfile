# docker build -t certipatch .            PyTorch's CPU build; for CUDA: --build-arg TORCH=https://download.pytorch.org/whl/cu130
# docker run --rm -v "$PWD:/work" certipatch demo
FROM python:3.12-slim
ARG TORCH=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt --extra-index-url "$TORCH" torch torchvision \
 && pip install --no-cache-dir -c /src/constraints.txt /src && rm -rf /src
WORKDIR /work
# Data sets and compiled networks go to the mounted folder, whoever the user is.
ENV CERTIPATCH_DATA=/work/.data TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
USER 1000
ENTRYPOINT ["certipatch"]
CMD ["--help"]
