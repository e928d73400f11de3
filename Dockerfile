# CPU:   docker build -t amed .
# CUDA:  docker build -t amed --build-arg BASE=pytorch/pytorch:2.6.0-cuda12.4-cudnn9-runtime .
# Run:   docker run --rm -v "$PWD/out:/data" amed python /opt/amed/sample.py --predictor_path=digits-span-4 --seeds=0-15
#        (add --gpus=all for CUDA)
ARG BASE=python:3.11-slim
FROM ${BASE}
WORKDIR /opt/amed
COPY . .
ARG EXTRAS=plot,hub
RUN pip install --no-cache-dir -e ".[${EXTRAS}]"
WORKDIR /data
ENV AMED_CACHE=/data/.cache
CMD ["python", "-m", "tools.doctor"]
