"""Your own kernel schedule: ``make scoreboard`` builds a product by it and takes its time. See IMPLEMENTATION_GUIDE.md, "Open
tasks".

The product is that of a decode step: y[t, n] is the sum over k of x[t, k] · weight[n, k], with 64 MiB of weights in 8 bits,
for one token and for sixteen. What it computes is given; how its loops are laid out is yours. The file is read and not run,
so write plain values.

- "tokens", "outputs": a tile, whose sums stay in registers. A weight is used for so many tokens once it is there, an input for
  so many outputs. 1, 2, 4, 8 or 16.
- "unroll": so many sums for each of them, so that an addition need not wait for the one before. 1, 2 or 4.
- "inputs": so many of them before the next tile comes; 0: all. 0, 256, 512, 1024 or 2048.
- "prefetch": so many bytes ahead weights are asked for; 0: not at all. 0 or a power of two from 64 to 4096.
- "outside": which loop over tiles is the outer one, "tokens" or "outputs".
- "threads": over which outputs are dealt out; 0: as many as there are cores.
"""

SCHEDULE = {
    "tokens": 1,
    "outputs": 1,
    "unroll": 1,
    "inputs": 0,
    "prefetch": 0,
    "outside": "tokens",
    "threads": 1,
}
