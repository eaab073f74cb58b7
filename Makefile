# Everything runs from here; `make` alone prints the targets.
# MODEL, DATA, HOST, PORT and URL are yours to set: make serve MODEL=model.tar.gz PORT=9000
# And of the images TARGET (serve, serve-cpu, train), IMAGE and BASE_IMAGE: make image TARGET=train. FRESH=1 builds them
# without any layer from before, and so with the security upgrades of today.

# Set these on the command line: variables of the environment are ignored, except BASE_IMAGE.
MODEL = artifacts/model
DATA = data
HOST = 127.0.0.1
PORT = 8080
URL = http://127.0.0.1:$(PORT)
TARGET = serve
IMAGE = resnet34-sagemaker:$(TARGET)
BASE_IMAGE ?=
FRESH =
PUSH_ARGS =
CONTRACT_ARGS =
PYTEST_ARGS =
BENCH_ARGS =
REHEARSE_ARGS =
CLOUD_ARGS =

# Also where `MODEL=` says nothing.
override MODEL := $(or $(MODEL),artifacts/model)

# Python writes bytecode when it first imports a module; where it must not, uv does, which takes each command some seconds.
# Without any, each process that imports torch takes 3 s longer, each service 0.7 (2 cores of an EPYC, torch 2.13, n = 2).
ifneq ($(PYTHONDONTWRITEBYTECODE),)
export UV_COMPILE_BYTECODE := 1
endif

UV := $(or $(shell command -v uv),.uv/bin/uv)
PYTHON := .venv/bin/python
DEVELOP := --group training --group dev --group debugger --group mlflow

.DEFAULT_GOAL := help
.PHONY: help setup setup-sagemaker notebook serve evaluate image image-cpu push contract test test-slow test-container test-aws rehearse \
  rehearse-cloud iam-role bench bench-training check fix clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(UV) ## set up for training and serving: .venv/
	$(UV) sync --frozen --inexact --group training

serve: $(UV) ## set up and serve MODEL on PORT; without MODEL a starter, fine-tuned first if it is not there
	$(UV) sync --frozen --inexact --group training
	@if [ "$(MODEL)" = artifacts/model ] && [ ! -e "$(MODEL)/manifest.json" ]; then \
	  $(PYTHON) -m service.listeners "$(HOST)" "$(PORT)" && \
	  $(PYTHON) -m training.starter --data data --output "$(MODEL)"; fi
	@exec $(PYTHON) -m service --model "$(MODEL)" --host "$(HOST)" --port "$(PORT)"

evaluate: $(UV) ## send DATA's validation images to URL and compare the accuracy with MODEL's manifest
	$(UV) sync --frozen --inexact --group training
	@exec $(PYTHON) -m training.evaluate_endpoint --data "$(DATA)" --model "$(MODEL)" --url "$(URL)"

image: $(UV) ## build the image TARGET: serve (CUDA), serve-cpu or train
	$(UV) sync --frozen --inexact
	@exec $(PYTHON) -m container.build --target "$(TARGET)" --tag "$(IMAGE)" --base-image "$(BASE_IMAGE)" $(if $(FRESH),--fresh)

image-cpu: ## build the image for processors, without torch: a tenth of the size
	@$(MAKE) --no-print-directory image TARGET=serve-cpu

push: $(UV) ## push the image TARGET to ECR and note its URI in artifacts/image.json
	$(UV) sync --frozen --inexact --group sagemaker
	@exec $(PYTHON) -m container.push --target "$(TARGET)" --image "$(IMAGE)" $(PUSH_ARGS)

contract: $(UV) ## check IMAGE, anybody's, against SageMaker's rules for hosting, with MODEL
	$(UV) sync --frozen --inexact
	@$(if $(filter file,$(origin IMAGE)),echo "checking $(IMAGE); for another: make contract IMAGE=NAME:TAG")
	@exec $(PYTHON) -m container.contract "$(IMAGE)" --model "$(MODEL)" $(CONTRACT_ARGS)

# First the tests that need no quiet machine, one on each core, then the others; of what PYTEST_ARGS choose, one half may
# have none (pytest's exit status 5).
QUICK := not slow and not container and not aws
test: $(UV) ## set up and run the tests (half an hour on 2 cores)
	$(UV) sync --frozen --inexact $(DEVELOP)
	@export UV="$(abspath $(UV))"; first=0; second=0; \
	$(PYTHON) -m pytest -m "parallel and $(QUICK)" -n logical --maxprocesses 4 --dist loadfile $(PYTEST_ARGS) || first=$$?; \
	$(PYTHON) -m pytest -m "not parallel and $(QUICK)" $(PYTEST_ARGS) || second=$$?; \
	if [ $$first -ne 0 ] && [ $$first -ne 5 ]; then exit $$first; fi; \
	if [ $$second -ne 5 ] || [ $$first -eq 5 ]; then exit $$second; fi

test-slow: $(UV) ## run the tests that train for minutes: the README's commands, start to end
	$(UV) sync --frozen --inexact $(DEVELOP) --group sagemaker --group notebook
	$(PYTHON) -m pytest -m slow -s $(PYTEST_ARGS)

test-container: $(UV) ## build the images and run them: needs a docker engine and 25 GB of disk (a quarter of an hour)
	$(UV) sync --frozen --inexact $(DEVELOP) --group sagemaker
	UV="$(abspath $(UV))" BASE_IMAGE="$(BASE_IMAGE)" $(PYTHON) -m pytest -m "container and not slow" $(PYTEST_ARGS)

rehearse: $(UV) ## the journey to SageMaker without an account: tune, train, deploy, batch, clean up (four to six minutes on 2 idle cores)
	$(UV) sync --frozen --inexact --group training --group dev --group sagemaker
	@$(PYTHON) -m tests.rehearsal $(REHEARSE_ARGS)

rehearse-cloud: $(UV) ## AWS on this machine until Ctrl-C, to try the commands by hand; it says how
	$(UV) sync --frozen --inexact --group training --group dev --group sagemaker
	@exec $(PYTHON) -m tests.rehearsal.cloud $(CLOUD_ARGS)

setup-sagemaker: $(UV) ## set up for the journey to Amazon SageMaker: training.launch, its notebook
	$(UV) sync --frozen --inexact --group training --group sagemaker --group notebook

notebook: setup-sagemaker ## open training/train_and_deploy.ipynb, the journey to SageMaker as a notebook
	@exec .venv/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) training/train_and_deploy.ipynb

iam-role: $(UV) ## make the role in your AWS account that SageMaker's jobs and endpoints run as
	$(UV) sync --frozen --inexact --group training --group sagemaker
	@$(PYTHON) -m training.launch iam-role

test-aws: $(UV) ## the tests that need an AWS account and spend a little: AWS_TEST_IMAGE=<URI of the image TARGET=train>; tests/launch/test_aws.py has more
	$(UV) sync --frozen --inexact --group training --group dev --group sagemaker
	$(PYTHON) -m pytest -m aws -s $(PYTEST_ARGS)

bench: $(UV) ## measure the service against its peers on a quiet machine: tests/bench/RESULTS.md (an hour or two)
	$(UV) sync --frozen --inexact $(DEVELOP)
	@UV="$(abspath $(UV))" $(PYTHON) -m tests.bench.serving $(BENCH_ARGS)

bench-training: $(UV) ## measure training on a quiet machine: tables in tests/bench/results (an hour or two)
	$(UV) sync --frozen --inexact $(DEVELOP)
	$(PYTHON) -m tests.bench.training
	$(PYTHON) -m tests.bench.transfer
	$(PYTHON) -m tests.bench.rules

check: $(UV) ## lint, formatting, types, lock file, known vulnerabilities; edits nothing
	$(UV) sync --frozen --inexact $(DEVELOP)
	$(UV) lock --check
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	@UV="$(abspath $(UV))" $(PYTHON) .ci/audit.py

fix: $(UV) ## mend what lint and formatting can mend
	$(UV) sync --frozen --inexact $(DEVELOP)
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

clean: ## remove the environment and caches; artifacts and data stay
	rm -rf .venv .uv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv from PyPI into a folder of ours; its own installer where Python has no venv module.
.uv/bin/uv:
	@echo "uv is not installed: putting it into .uv/"
	@(python3 -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv) || \
	  curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$(CURDIR)/.uv/bin" UV_NO_MODIFY_PATH=1 sh
	@test -x .uv/bin/uv || { echo "uv could not be installed; see https://docs.astral.sh/uv/" >&2; exit 1; }
