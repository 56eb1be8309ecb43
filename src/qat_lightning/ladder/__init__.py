"""Search for an int8 network that meets a target: PTQ, recipes, layers left float, fewer bits and QAT, cheapest first.

`reach` (``search.py``) measures the float network and starts the search (``climb.py``). The next step is a pure
function (``choice.py``) of the measurements so far and of a table of rungs (``rungs.py``). Each rung is for one limit
and changes a `Plan` (``plan.py``); ``sources.py`` orders those for accuracy by where the error comes from.
``workshop.py`` creates the network of a plan and evaluates the file that was written, on fresh copies and with the same
seed. ``parts.py`` computes the user's own metric on each part of the validation data, and ``judgement.py`` compares two
networks by it. Every measurement is a file in the folder of the search (``store.py``), written completely or not at
all, so that an interrupted search resumes and makes the same choice.
"""
