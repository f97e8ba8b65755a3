# The DALL-E chain, shared by the recipes. A recipe sets DATA (a data set) and READY (files that say it is there), and
# may set CONFIG, OUT, N, KEEP, WITHOUT (ids that CLIP and prior are trained without), PAIRS (the data set that CLIP and
# the prior learn from, if not DATA), ENCODE (how the prior's pictures are cropped) and TRAINED (where its weights go, if
# they are not yet the model's). A stage that finds its work done leaves it alone, so `make` may be repeated. After a
# change of recipe or data, a training stage refuses to replace what it has trained: `make FRESH=--fresh` trains all
# stages that are out of date anew.

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
LEAVE = $(if $(WITHOUT),--exclude $(WITHOUT))

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
	$(DALLE) train-clip '$(PAIRS)' -t $< $(FLAGS) $(LEAVE) $(FRESH) --seed $(SEED) -o $@

$(TRAINED): $(OUT)/captions.safetensors $(OUT)/codes.safetensors
	$(DALLE) train-prior $^ -t $(MODEL)/tokenizer.json $(FLAGS) $(LEAVE) $(FRESH) --seed $(SEED) -o $@

# From a file of prompts to pictures: NAME.txt -> codes -> pictures -> the best of each prompt.
$(OUT)/%.codes.safetensors: $(OUT)/%.txt $(MODEL)/prior.safetensors
	$(DALLE) sample --prompts $< -n $(N) -m $(MODEL) --seed $(SEED) $(SAMPLE) -o $@

$(OUT)/%.images.safetensors: $(OUT)/%.codes.safetensors
	$(DALLE) decode $< -m $(MODEL) -o $@

$(OUT)/%.best.safetensors: $(OUT)/%.images.safetensors $(MODEL)/clip.safetensors
	$(DALLE) rerank $< -m $(MODEL) --keep 1 -o $@

clean:
	rm -rf $(OUT)
.PHONY: clean
