policy many_errors
param interval: itn = 3
mach attention -> reuse
match attention evry interval -> reuse
match "^(a|b" when stp < 3 -> reuse
let late = step >
match feedforward every 2 when late -> reuse
match model
every 2 -> reuse
expect attention over 3 steps: C R
