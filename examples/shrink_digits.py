"""Train a small network on the handwritten digits, prune and quantize it, and measure the file.

Usage: shrink_digits.py FILE.tersor
"""

import sys

import tersor


def main(path: str) -> None:
    data = tersor.load_data("digits")
    recipe = tersor.Finetune(epochs=8, batch_size=64, augment="crop")
    module = tersor.finetune(tersor.load_model("digits_net"), data, recipe).module
    pruned = tersor.prune(module, tersor.Prune(sparsity=0.5, scope="global"))
    graph = tersor.export_onnx(pruned.module, data.input_shape)
    small = tersor.quantize(graph, tersor.Quantize(), data.batches(data.calibration, 64))
    size_bytes = tersor.write(small.graph, path, plan=small.plan)
    original = tersor.evaluate(
        tersor.open_session(tersor.export_onnx(module, data.input_shape)), data
    )
    score = tersor.evaluate(tersor.open_session(tersor.load(path)), data)
    interval = tersor.paired_interval(score, original)
    print(f"{size_bytes} bytes, accuracy {score.accuracy:.3f}")
    print(
        f"{interval.difference_pt:+.2f} points, interval {interval.low_pt:+.2f} to {interval.high_pt:+.2f}"
    )


if __name__ == "__main__":
    main(sys.argv[1])
