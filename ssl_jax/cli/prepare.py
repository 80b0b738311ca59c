"""Write a smaller copy of a dataset, which is read faster.

  python launch.py prepare --data=imagenet2012 --splits=train,validation --output=/data/imagenet_256
  python launch.py prepare --data=~/photos --splits=all --output=/data/photos_256 --form=raw
  python launch.py train --config=configs/simclr.py:imagenet --workdir=runs/a --config.data.name=/data/imagenet_256

Images get a short side of --side pixels at most, and are stored as JPEG, or as raw pixels (nine times the space, and no
decoding). Their labels stay. Small crops of a smaller copy are less sharp than those of the originals.
"""

from __future__ import annotations

from ssl_jax.cli.main import folder, refuse_rest, whole


def add_arguments(sub) -> None:
    sub.add_argument("--data", required=True, help="a name or a path, as config.data.name")
    sub.add_argument("--data_dir", default="", help="where a dataset with a name lies (default: $TFDS_DATA_DIR)")
    sub.add_argument("--splits", default="train", help="names with commas between them (default: train)")
    sub.add_argument("--output", type=folder("--output"), required=True, help="directory of the copy")
    sub.add_argument(
        "--side", type=whole("--side", 1, 2**14), default=256, help="largest short side in pixels (default 256)"
    )
    sub.add_argument("--form", choices=("jpeg", "raw"), default="jpeg", help="of an image (default jpeg)")
    sub.add_argument("--quality", type=whole("--quality", 1, 100), default=90, help="of JPEG (default 90)")


def main(args, overrides) -> int:
    refuse_rest(overrides)
    from ssl_jax.data.preparation import prepare  # imports the data libraries, which --help avoids

    choices = {"side": args.side, "form": args.form, "quality": args.quality}
    for each in prepare(args.data, args.splits.split(","), args.output.expanduser(), data_dir=args.data_dir, **choices):
        size = f"{each.bytes / 2**20:,.1f} MiB of images, {each.bytes / each.bytes_before:.2f} of the originals"
        print(
            f"{each.split}: {each.examples:,} examples, {size}"
            + (f"; {each.left_out:,} unreadable" if each.left_out else "")
        )
    print(f"read it by --config.data.name={args.output.expanduser().absolute()}")
    return 0
