# The DALL-E 2 chain, shared by the recipes: include it after dalle.mk, whose tokenizer and CLIP serve both systems. A
# recipe has its numbers in UNCLIP_CONFIG. It may set UNCLIP (the folder), PRIORS, UPSAMPLERS ("1" or "1 2"), SETTINGS
# (`--set` of those numbers), PRIOR_FLAGS (options of `sample`) and DECODER_FLAGS (options of `decode`).

UNCLIP_CONFIG ?= unclip.toml
UNCLIP ?= $(OUT)/unclip
PRIORS ?= diffusion autoregressive
UPSAMPLERS ?=
NUMBERS := --config $(UNCLIP_CONFIG) $(SETTINGS)
BORROWED := tokenizer.json clip.safetensors
DECODERS := decoder.safetensors $(UPSAMPLERS:%=upsampler-%.safetensors)
# what `decode` reads
SHARED := tokenizer.json $(DECODERS)

# z_i of the images, and captions with their z_t.
$(OUT)/embeddings.safetensors: $(MODEL)/clip.safetensors
	$(DALLE) encode-images '$(PAIRS)' -m $< $(FLAGS) -o $@

$(OUT)/texts.safetensors: $(MODEL)/tokenizer.json $(MODEL)/clip.safetensors
	$(DALLE) tokenize '$(PAIRS)' -t $< -m $(word 2,$^) $(FLAGS) -o $@

$(UNCLIP)/decoder.safetensors: $(OUT)/embeddings.safetensors $(OUT)/texts.safetensors $(UNCLIP_CONFIG)
	$(DALLE) train-decoder '$(PAIRS)' $< --captions $(word 2,$^) $(NUMBERS) $(EXCLUDE_FLAGS) $(FRESH) --seed $(SEED) -o $@

$(UNCLIP)/upsampler-%.safetensors: $(READY) $(UNCLIP_CONFIG)
	$(DALLE) train-decoder $(DATA) --upsampler $* $(NUMBERS) $(FRESH) --seed $(SEED) -o $@

# One bundle for each prior; shared files are linked into it. From NAME.txt to images: UNCLIP/PRIOR-NAME.
define SYSTEM
$(UNCLIP)/$(1)/prior.safetensors: $(OUT)/texts.safetensors $(OUT)/embeddings.safetensors $(UNCLIP_CONFIG)
	$$(DALLE) train-prior $$(wordlist 1,2,$$^) $$(NUMBERS) --set embedding_prior.kind=$(1) $$(EXCLUDE_FLAGS) $$(FRESH) --seed $$(SEED) -o $$@

$(BORROWED:%=$(UNCLIP)/$(1)/%): $(UNCLIP)/$(1)/%: $(MODEL)/%
	mkdir -p $$(@D) && { ln -f $$< $$@ || cp -p $$< $$@; }

$(DECODERS:%=$(UNCLIP)/$(1)/%): $(UNCLIP)/$(1)/%: $(UNCLIP)/%
	mkdir -p $$(@D) && { ln -f $$< $$@ || cp -p $$< $$@; }

$(UNCLIP)/$(1)-%.embeddings.safetensors: $(OUT)/%.txt $(BORROWED:%=$(UNCLIP)/$(1)/%) $(UNCLIP)/$(1)/prior.safetensors
	$$(DALLE) sample --prompts $$< -n $$(N) -m $(UNCLIP)/$(1) --seed $$(SEED) $$(PRIOR_FLAGS) -o $$@

$(UNCLIP)/$(1)-%.images.safetensors: $(UNCLIP)/$(1)-%.embeddings.safetensors $(SHARED:%=$(UNCLIP)/$(1)/%)
	$$(DALLE) decode $$< -m $(UNCLIP)/$(1) --seed $$(SEED) $$(DECODER_FLAGS) -o $$@
endef
$(foreach prior,$(PRIORS),$(eval $(call SYSTEM,$(prior))))
