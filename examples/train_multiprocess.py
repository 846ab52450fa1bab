"""Data-parallel training with jax_bce in several processes, on one machine or on many.

    python examples/train_multiprocess.py                 # one process with all of its devices
    python examples/train_multiprocess.py --processes 4   # four processes on this machine's CPU

For two hosts with GPUs, run one line on each; process 0 is on 10.0.0.1 (this has not been run yet):

    python examples/train_multiprocess.py --coordinator 10.0.0.1:1234 --processes 2 --process 0
    python examples/train_multiprocess.py --coordinator 10.0.0.1:1234 --processes 2 --process 1

The network says whether a handwritten digit is 5 or more. Every device computes the loss of its
share of a batch, and the mean is over the whole batch. Apart from rounding, the final weights are
the same for any number of processes. If one process dies, the others stop with an error after at
most about --heartbeat seconds.
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_bce

Weights = dict[str, jax.Array]


def initial_weights() -> Weights:
    glorot = jax.nn.initializers.glorot_uniform()
    keys = jax.random.split(jax.random.key(0), 2)
    return {"hidden": glorot(keys[0], (64, 128)), "output": glorot(keys[1], (128, 1))}


def logits_of(weights: Weights, images: jax.Array) -> jax.Array:
    return (jax.nn.relu(images @ weights["hidden"]) @ weights["output"])[:, 0]


def load() -> list[np.ndarray]:
    """Training images, test images, training labels and test labels."""
    # Imported here: it takes seconds, and the process that starts the others does not need it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    return train_test_split(np.float32(digits.data / 16), digits.target >= 5, random_state=0)


def train(options: argparse.Namespace) -> None:
    if options.batch % jax.device_count():
        sys.exit(f"--batch {options.batch} cannot be shared by {jax.device_count()} devices")

    train_images, test_images, train_labels, test_labels = load()
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), (AxisType.Auto,))
    shared = NamedSharding(mesh, PartitionSpec("batch"))
    copied = NamedSharding(mesh, PartitionSpec())
    optimizer = optax.sgd(0.1, momentum=0.9)

    # Compiled, so that the weights are created in place, on every device of every process.
    weights = jax.jit(initial_weights, out_shardings=copied)()
    state = jax.jit(optimizer.init, out_shardings=copied)(weights)

    @jax.jit
    def step(
        weights: Weights, state: optax.OptState, images: jax.Array, labels: jax.Array
    ) -> tuple[Weights, optax.OptState, jax.Array]:
        def objective(weights: Weights) -> jax.Array:
            return jax_bce.loss(logits_of(weights, images), labels)

        loss, gradients = jax.value_and_grad(objective)(weights)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(weights, updates), state, loss

    losses = []
    for number in range(options.steps):
        # The batch is the same in every process; each process takes its part.
        rows = np.random.default_rng(number).permutation(len(train_images))[: options.batch]
        rows = np.split(rows, jax.process_count())[jax.process_index()]
        images, labels = (
            jax.make_array_from_process_local_data(shared, array[rows])
            for array in (train_images, train_labels)
        )
        weights, state, loss = step(weights, state, images, labels)
        losses.append(float(loss))
        if jax.process_index() == 0:
            print(f"step {number} loss {losses[-1]:.4f}", flush=True)

    if jax.process_index() == 0:
        weights = jax.device_get(weights)
        correct = (logits_of(weights, test_images) > 0) == test_labels
        print(
            f"processes {jax.process_count()}, devices {jax.device_count()}, "
            f"accuracy on unseen digits {correct.mean():.3f}"
        )
        if options.save:
            np.savez(options.save, losses=np.float32(losses), **weights)


def start_on_this_machine(processes: int) -> int:
    """Runs this command in several numbered processes; returns the worst exit status."""
    with socket.socket() as reserved:
        # Bound but not listening: no other program gets the port, and the coordinator can share it.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("", 0))
        coordinator = f"localhost:{reserved.getsockname()[1]}"
        command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process"]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        started = [
            subprocess.Popen([*command, f"{process}"], env=environment)
            for process in range(processes)
        ]
        return max(abs(process.wait()) for process in started)


def main() -> None:
    parser = argparse.ArgumentParser(description="train with jax_bce in several processes")
    parser.add_argument("--processes", type=int, default=1, help="the number of processes")
    parser.add_argument("--coordinator", help="address:port where process 0 listens")
    parser.add_argument("--process", type=int, help="the number of this process, from 0")
    parser.add_argument(
        "--heartbeat", type=int, default=100, help="seconds until a silent process is dead"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=120, help="batch size of all devices together")
    parser.add_argument("--save", type=Path, help=".npz file for the weights and the losses")
    options = parser.parse_args()

    if options.processes > 1 and not options.coordinator:
        sys.exit(start_on_this_machine(options.processes))
    if options.coordinator:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            heartbeat_timeout_seconds=options.heartbeat,
        )
    train(options)


if __name__ == "__main__":
    main()
