param interval: int = 3
let interval = 4
match attention every interval -> reuse
