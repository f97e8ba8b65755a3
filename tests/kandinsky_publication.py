"""A tiny Kandinsky 2.2 in its publisher's format, by diffusers and transformers: two repositories in one folder."""

from karlo_publication import WIDTH, clip, prior, text_encoder, tokenizer
from planted_weights import randomized

SIDE = 16  # of the latents; images are twice as large
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "clip_sample": False, "steps_offset": 1,
    "variance_type": "fixed_small", "prediction_type": "epsilon", "timestep_spacing": "leading",
}  # fmt: skip


def image_encoder(whole):
    """The vision tower of a CLIP with the projection, in a file of its own."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**{**whole.config.vision_config.to_dict(), "projection_dim": WIDTH})
    )
    missing, _ = model.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    return model.eval()


def unet():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=SIDE, in_channels=4, out_channels=8, block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=24, attention_head_dim=8, encoder_hid_dim=WIDTH, encoder_hid_dim_type="image_proj",
        addition_embed_type="image", norm_num_groups=8, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    return randomized(model, 2, 0.15).eval()


def movq():
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), latent_channels=4, num_vq_embeddings=12,
        norm_type="spatial", layers_per_block=1, vq_embed_dim=4,
    )  # fmt: skip
    randomized(model, 3)
    for name, p in model.named_parameters():  # the latents of a decoder that has learned nothing are large
        if "conv_y.weight" in name or "conv_b.weight" in name or name == "post_quant_conv.weight":
            p.data /= 40
    return model.eval()


def components():
    """Everything that diffusers' two pipelines are made of."""
    from diffusers import DDPMScheduler, UnCLIPScheduler

    words = tokenizer()
    whole = clip(len(words))
    schedule = {"variance_type": "fixed_small_log", "clip_sample_range": 10.0, "prediction_type": "sample"}
    return {
        "prior": prior(), "text_encoder": text_encoder(whole), "image_encoder": image_encoder(whole),
        "tokenizer": words, "prior_scheduler": UnCLIPScheduler(**schedule), "unet": unet(), "movq": movq(),
        "scheduler": DDPMScheduler(**SCHEDULE),
    }  # fmt: skip


def publish(parts, folder):
    """Write them as their publisher does; the decoder's schedule stands in the place of the prior's."""
    for name, part in parts.items():
        if name != "prior_scheduler":
            part.save_pretrained(folder / name)
    return folder
