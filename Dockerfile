# docker build -t sela .
# docker run --rm --gpus all -v "$PWD:/data" sela run --data photos/ --out runs/photos
FROM python:3.12-slim
# Triton's kernel and --compile need a compiler when they run.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir '/src[report,parquet,tensorboard]' && rm -r /src
WORKDIR /data
ENTRYPOINT ["sela"]
