# The DALL-E 2 chain, shared by the recipes: included after dalle.mk, whose tokenizer and CLIP serve both systems.
# A recipe has its numbers in UNCLIP_CONFIG and may set UNCLIP (where), PRIORS, UPSAMPLERS ("1" or "1 2"),
# SETTINGS (`--set` of those numbers), and what `sample` and `decode` are told: DRAW, PAINT.

UNCLIP_CONFIG ?= unclip.toml
UNCLIP ?= $(OUT)/unclip
PRIORS ?= diffusion autoregressive
UPSAMPLERS ?=
NUMBERS := --config $(UNCLIP_CONFIG) $(SETTINGS)
LENT := tokenizer.json clip.safetensors
PAINTERS := decoder.safetensors $(UPSAMPLERS:%=upsampler-%.safetensors)
# what `decode` reads
SHARED := tokenizer.json $(PAINTERS)

# z_i of the pictures, and captions with their z_t.
$(OUT)/embeddings.safetensors: $(MODEL)/clip.safetensors
	$(DALLE) encode-images '$(PAIRS)' -m $< $(FLAGS) -o $@

$(OUT)/texts.safetensors: $(MODEL)/tokenizer.json $(MODEL)/clip.safetensors
	$(DALLE) tokenize '$(PAIRS)' -t $< -m $(word 2,$^) $(FLAGS) -o $@

$(UNCLIP)/decoder.safetensors: $(OUT)/embeddings.safetensors $(OUT)/texts.safetensors $(UNCLIP_CONFIG)
	$(DALLE) train-decoder '$(PAIRS)' $< --captions $(word 2,$^) $(NUMBERS) $(LEAVE) $(FRESH) --seed $(SEED) -o $@

$(UNCLIP)/upsampler-%.safetensors: $(READY) $(UNCLIP_CONFIG)
	$(DALLE) train-decoder $(DATA) --upsampler $* $(NUMBERS) $(FRESH) --seed $(SEED) -o $@

# One bundle for each prior; what they share is linked into them. From NAME.txt to pictures: UNCLIP/PRIOR-NAME.
define SYSTEM
$(UNCLIP)/$(1)/prior.safetensors: $(OUT)/texts.safetensors $(OUT)/embeddings.safetensors $(UNCLIP_CONFIG)
	$$(DALLE) train-prior $$(wordlist 1,2,$$^) $$(NUMBERS) --set embedding_prior.kind=$(1) $$(LEAVE) $$(FRESH) --seed $$(SEED) -o $$@

$(LENT:%=$(UNCLIP)/$(1)/%): $(UNCLIP)/$(1)/%: $(MODEL)/%
	mkdir -p $$(@D) && { ln -f $$< $$@ || cp -p $$< $$@; }

$(PAINTERS:%=$(UNCLIP)/$(1)/%): $(UNCLIP)/$(1)/%: $(UNCLIP)/%
	mkdir -p $$(@D) && { ln -f $$< $$@ || cp -p $$< $$@; }

$(UNCLIP)/$(1)-%.embeddings.safetensors: $(OUT)/%.txt $(LENT:%=$(UNCLIP)/$(1)/%) $(UNCLIP)/$(1)/prior.safetensors
	$$(DALLE) sample --prompts $$< -n $$(N) -m $(UNCLIP)/$(1) --seed $$(SEED) $$(DRAW) -o $$@

$(UNCLIP)/$(1)-%.images.safetensors: $(UNCLIP)/$(1)-%.embeddings.safetensors $(SHARED:%=$(UNCLIP)/$(1)/%)
	$$(DALLE) decode $$< -m $(UNCLIP)/$(1) --seed $$(SEED) $$(PAINT) -o $$@
endef
$(foreach prior,$(PRIORS),$(eval $(call SYSTEM,$(prior))))
