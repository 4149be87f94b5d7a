# Install the dependencies in a virtual environment, without the tests' own; the second stage copies it.
FROM python:3.13-slim AS build
WORKDIR /build
COPY requirements.txt .
RUN sed -i '/^# The tests/,$d' requirements.txt && \
    python -m venv /venv && /venv/bin/pip install --no-cache-dir -r requirements.txt

FROM python:3.13-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin users-service
WORKDIR /app
COPY --from=build /venv /venv
COPY manage.py ./
COPY migrations migrations
COPY project project
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    APP_SETTINGS=project.config.ProductionConfig \
    GRANIAN_HOST=0.0.0.0 \
    GRANIAN_PORT=5000
USER 10001
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"GRANIAN_PORT\"]}/health/live', timeout=2)"]
CMD ["python", "manage.py", "serve"]
