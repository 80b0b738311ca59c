"""Write the features of images to files, with their names and labels.

  python launch.py features --workdir=runs/simclr --split=test --output=features/test
  python launch.py features --workdir=runs/simclr --config.data.name=/photos --format=parquet --output=features/photos
  python launch.py features --weights=resnet50.pth --config=configs/supervised.py:imagenet_resnet50 --output=features/r50

--format=npy writes features.npy (float32 [N, D], which np.load maps into memory with mmap_mode='r'), names.txt (a line for each row)
and labels.npy (int32) where the data have labels. --format=parquet writes the directory features.parquet with the columns name,
label and features. A name is the path of a file in its folder, or else the number of the example in its split. Rows have the order of
the data. features.json says whose features they are.

The same command on the same output goes on after a kill. It may be started as several processes, which share the work.
"""

from __future__ import annotations

from ssl_jax.cli.main import add_encoder, check_encoder, folder, whole


def add_arguments(sub) -> None:
    add_encoder(sub)
    sub.add_argument("--output", type=folder("--output"), required=True, help="directory to write")
    sub.add_argument("--format", default="npy", choices=("npy", "parquet"), help="npy (default) or parquet")
    sub.add_argument("--split", help="of the data (default: every image of a folder of images, else the train split of the config)")
    sub.add_argument("--layer", default="pooled", help="of the encoder (default: pooled); maps and tokens are averaged over space")
    sub.add_argument(
        "--shard_rows", type=whole("--shard_rows", 1), default=10_000,
        help="rows, rounded up to whole batches, that a kill can lose and that a file of Parquet has (default: 10000)",
    )  # fmt: skip


def main(args, overrides) -> int:
    check_encoder(args)
    from ssl_jax.experiment import write_features  # imports JAX, which --help avoids

    source = (
        write_features.of_weights(args.weights, args.config, overrides)
        if args.weights
        else write_features.of_run(args.workdir, overrides, args.step)
    )
    write_features.write(source, args.output, args.format, args.split, args.layer, args.shard_rows)
    return 0
