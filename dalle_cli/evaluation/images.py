"""Generated images against real ones: what `dalle evaluate IMAGES --reference DATASET` computes."""

from pathlib import Path
from typing import Any

from dalle_cli import console
from dalle_cli.artifacts.container import replace_file
from dalle_cli.data.exclude import read_exclude_list
from dalle_cli.devices import Arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation.cache import FeaturePass
from dalle_cli.evaluation.feature_batch import Features
from dalle_cli.evaluation.features import ClipFeatures, load_features, title
from dalle_cli.evaluation.image_metrics import Comparison, score
from dalle_cli.evaluation.image_sets import GENERATED, REFERENCE, open_image_set
from dalle_cli.evaluation.options import EvaluateOptions
from dalle_cli.hub import bundles
from dalle_cli.viz import charts, metric_charts


def evaluate_images(
    generated: str, out: Path, options: EvaluateOptions, machine: Arithmetic, force: bool = False
) -> dict[str, Any]:
    """All metrics of an `images` artifact or a data set against `options.reference`; features are stored beside `out`.

    Raises:
        DalleError: no images, too few of them, or a metric by name that they cannot have.
    """
    if options.plot is not None:
        charts.check(options.plot, force)
        charts.load_matplotlib()
    sources = ((GENERATED, generated), (REFERENCE, str(options.reference)))
    sets = tuple(open_image_set(name, source, options.limit) for name, source in sources)
    excluded = read_exclude_list(options.exclude, [own for one in sets for own in one.images.ids])
    size = options.size or sets[0].size()
    if max(options.radii) >= size:
        raise DalleError(f"expected radii of blur below {size} pixels, found {max(options.radii):g}; correct --blur")
    network = load_features(options.features, options.model, machine)
    clip = _caption_clip(network, options, machine)
    networks = [network] if clip is None or clip.name == network.name else [network, clip]
    folder = out.with_name(out.name.removesuffix(".json") + ".features")
    run = FeaturePass(folder, networks, options.radii, size, machine, options.batch_size, options.workers)
    comparison = Comparison(sets, network, clip, run, options, excluded)
    scores, left_out = score(comparison)
    if (path := options.plot) is not None:
        name = Path(generated).name.partition(".")[0]
        figure = metric_charts.draw(metric_charts.curves(scores), f"{name}: metrics by blur")
        replace_file(path, lambda part: charts.save(figure, part, path.suffix))
    return {**_provenance(comparison), "scores": scores, "left_out": left_out}


def _caption_clip(network: Features, options: EvaluateOptions, machine: Arithmetic) -> ClipFeatures | None:
    """The CLIP that images are compared with captions by: that of -m, else that of --features; None without one."""
    if options.names and "clip" not in options.names:
        return None
    try:
        found = network if isinstance(network, ClipFeatures) else None
        if options.features is not None and options.model is not None:
            weights = bundles.weights(options.model, "weights.clip")
            if found is None or found.digest != weights.digest:
                found = ClipFeatures(weights, machine)
        if found is not None:
            bundles.tokenizer(found.weights)  # before a long pass over images
        return found
    except DalleError as error:
        if options.names:
            raise
        console.warn(f"no CLIP score: {error}")
        return None


def _provenance(c: Comparison) -> dict[str, Any]:
    """What was compared, with which network and settings: digests, no paths."""
    digests = {name: one.digest for name, one in c.sets.items()} | {"features": c.features.digest}
    settings = {"seed": c.options.seed, "bootstrap": c.options.bootstrap}
    return {
        "name": title(c.features),
        "features": {"name": c.features.name, "width": c.features.width, "classes": c.features.classes},
        "inputs": digests | ({} if c.clip is None else {"clip": c.clip.digest}),
        "counts": {name: c.counts(name) for name in c.sets},
        "options": {**settings, "size": c.run.size, "dtype": c.run.machine.name},
    }
