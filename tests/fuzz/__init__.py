"""Random programs, against the same programs on dense weights in double precision.

    python -m tests.fuzz --programs 10000 --seed 0 --jobs 2

A program is a text: the arrays that it is given, a function of them, and one call of
`verify`. So it can be printed, pasted, kept and run again. `steps`, `uses` and `flow`
draw its lines, `programs` puts them together, `arrays` and `oracle` run it, and
`search` goes through many and shrinks those that fail.
"""
