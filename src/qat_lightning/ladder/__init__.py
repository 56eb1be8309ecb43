"""From a target to the int8 network that keeps it: PTQ, recipes, layers, bits and QAT, the cheap ones first.

`reach` (``search.py``) measures the float network and climbs (``climb.py``). What is next is a pure function
(``choice.py``) of what was measured so far and of a table of rungs (``rungs.py``): each names the limit that it is for
and changes a `Plan` (``plan.py``). The ``workshop.py`` makes the network of a plan and evaluates the file that was
made, on fresh copies and from the same seed; ``parts.py`` gives the user's own metric on each part of the validation
data, and ``judgement.py`` compares two networks by it. Everything measured is a file of ``store.py``, written whole, so
that a search that is broken off at any moment goes on and ends with the same choice.
"""
