# The DALL-E chain, shared by the recipes. A recipe sets DATA (a data set) and READY (files that show that it exists). It
# may set CONFIG, OUT, N, KEEP, EXCLUDE (ids that CLIP and the prior are not trained on), PAIRS (the data set of CLIP and
# the prior, if not DATA), ENCODE (options of encode-images for the prior) and TRAINED (where train-prior writes, if not
# the model's folder). A stage that finds its work done leaves it alone, so you may repeat `make`. After a change of recipe
# or data, a training stage refuses to replace what it has trained: `make -k` brings the unchanged stages up to date, then
# `make FRESH=--fresh` trains the others again.

DALLE ?= dalle
PY ?= python3
CONFIG ?= recipe.toml
OUT ?= build
SEED ?= 0
FRESH ?=
N ?= 16
PAIRS ?= $(DATA)
MODEL := $(OUT)/model
TRAINED ?= $(MODEL)/prior.safetensors
FLAGS := --config $(CONFIG)
EXCLUDE_FLAGS = $(if $(EXCLUDE),--exclude $(EXCLUDE))

.DELETE_ON_ERROR:
.SECONDARY:

$(MODEL)/tokenizer.json: $(READY) $(CONFIG)
	$(DALLE) train-tokenizer $(DATA) $(FLAGS) -o $@

$(OUT)/captions.safetensors: $(MODEL)/tokenizer.json
	$(DALLE) tokenize '$(PAIRS)' -t $< $(FLAGS) -o $@

$(MODEL)/dvae.safetensors: $(READY) $(CONFIG)
	$(DALLE) train-dvae $(DATA) $(FLAGS) $(FRESH) --seed $(SEED) -o $@

$(OUT)/codes.safetensors: $(MODEL)/dvae.safetensors
	$(DALLE) encode-images '$(PAIRS)' -m $< $(FLAGS) $(ENCODE) -o $@

$(MODEL)/clip.safetensors: $(MODEL)/tokenizer.json
	$(DALLE) train-clip '$(PAIRS)' -t $< $(FLAGS) $(EXCLUDE_FLAGS) $(FRESH) --seed $(SEED) -o $@

$(TRAINED): $(OUT)/captions.safetensors $(OUT)/codes.safetensors
	$(DALLE) train-prior $^ -t $(MODEL)/tokenizer.json $(FLAGS) $(EXCLUDE_FLAGS) $(FRESH) --seed $(SEED) -o $@

# From a file of prompts to images: NAME.txt -> codes -> images -> the best of each prompt.
$(OUT)/%.codes.safetensors: $(OUT)/%.txt $(MODEL)/prior.safetensors
	$(DALLE) sample --prompts $< -n $(N) -m $(MODEL) --seed $(SEED) $(SAMPLE) -o $@

$(OUT)/%.images.safetensors: $(OUT)/%.codes.safetensors
	$(DALLE) decode $< -m $(MODEL) -o $@

$(OUT)/%.best.safetensors: $(OUT)/%.images.safetensors $(MODEL)/clip.safetensors
	$(DALLE) rerank $< -m $(MODEL) --keep 1 -o $@

clean:
	rm -rf $(OUT)
.PHONY: clean
