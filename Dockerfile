# docker build -t glad .                            for CPUs
# docker build --build-arg TORCH=cu130 -t glad .    for NVIDIA GPUs; docs/install.md says how to run it
#
# For one machine. Machines of a cluster run cluster/kuberay/Dockerfile, whose Ray and packages are those of the lock.
FROM python:3.11-slim
# PyTorch's wheels for GPUs bring CUDA along, so both kinds begin with the same image.
ARG TORCH=cpu
RUN pip install --no-cache-dir "torch>=2.6" "torchvision>=0.21" --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY . /opt/glad
RUN pip install --no-cache-dir "/opt/glad[export]" && useradd --create-home --uid 1000 glad
USER 1000
WORKDIR /data
ENTRYPOINT ["glad"]
CMD ["--help"]
