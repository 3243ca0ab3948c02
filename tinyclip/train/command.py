"""``tinyclip train``: a CLIP from images and captions, on one process or under torchrun."""

import argparse

from tinyclip.train import options, start
from tinyclip.train.loop import fit
from tinyclip.train.objective import Contrastive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """open_clip's names, where it has one."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        help="a name such as ViT-B-32, a config's JSON file, or a folder or weight file to go on"
        " from",
    )
    group.add_argument("--pretrained", metavar="PATH", help="weights for a --model without any")
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a vocabulary, or 'digits'; default: the model folder's, else CLIP's own",
    )
    options.add_data(parser)
    options.add_training(parser)
    options.add_run(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and say where the model is."""
    with start.process(args) as (device, ranks):
        folder = start.run_folder(args, args.model, ranks)
        model, preprocess, tokenizer = start.open_model(args.model, args.pretrained)
        tokenizer = start.open_tokenizer(args.tokenizer, tokenizer, model.config)
        begun = start.Start(model.to(device), preprocess, tokenizer)
        model.set_grad_checkpointing(args.grad_checkpointing)
        loader = options.make_loader(args, [begun.reader], ranks, device)
        settings = options.make_settings(args, loader, device)
        config = {"settings": vars(settings), "model_cfg": model.config.to_dict()}
        run = start.make_run(folder, begun, args, config)
        start.seed(args.seed + ranks.rank)
        summary = fit(
            model,
            Contrastive(),
            loader,
            settings,
            run=run,
            resume=start.resume_from(args, folder),
        )
        start.report(summary, run, args, ranks)
    return 0
