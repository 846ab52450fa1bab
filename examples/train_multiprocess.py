"""jax_bce in data-parallel training: one program in several processes, on one machine or on many.

    python examples/train_multiprocess.py                 # one process, all of its devices
    python examples/train_multiprocess.py --processes 4   # four, on this machine's CPU

Two hosts with GPUs, one line on each; process 0 is on 10.0.0.1 (this has not been run yet):

    python examples/train_multiprocess.py --coordinator 10.0.0.1:1234 --processes 2 --process 0
    python examples/train_multiprocess.py --coordinator 10.0.0.1:1234 --processes 2 --process 1

A network says of a handwritten digit whether it is 5 or more. Every device computes the loss of its
share of a batch and the mean is that of the whole batch: the weights that come out are the same but
for rounding, however many processes there are. Where one dies, the others end with an error, after
about --heartbeat seconds at most.
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
    """Images to train on and to test on, then their labels."""
    # Imported here: it takes seconds, and the process that starts the others has no use for it.
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

    # Compiled, so that the weights are made where they are to be: on every device of every process.
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
        # The same batch in every process, which takes its part of it.
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
    """Runs this command in so many processes, each with its number; gives the worst exit status."""
    with socket.socket() as reserved:
        # Bound and not listening: nobody else is given the port, and the coordinator can share it.
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
    parser = argparse.ArgumentParser(description="jax_bce in several processes")
    parser.add_argument("--processes", type=int, default=1, help="how many there are")
    parser.add_argument("--coordinator", help="address:port of process 0, which listens there")
    parser.add_argument("--process", type=int, help="the number of this one, from 0")
    parser.add_argument("--heartbeat", type=int, default=100, help="seconds, then silent is dead")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=120, help="of all devices together")
    parser.add_argument("--save", type=Path, help="an .npz for the weights and the losses")
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
