"""The benchmark of methods: every updater on the same concepts, prompts, seeds and judge.

    python -m benchmarks.methods --workers 2          # run what is missing, then write the pages
    python -m benchmarks.methods --plan               # what is missing, and about how long it takes
    python -m benchmarks.methods --report             # the pages again, from the published JSON alone

    table -> plan -> work -> measure -> records -> pool -> report
    methods  cells   claims   pictures   JSON       intervals  Markdown, PNG

A cell is one edit (or one cost, or the unedited pictures of one concept); its JSON file appears when it is finished and
is never made twice. Cells depend on nothing but their own description, so that any number of processes may take them
from one folder, be killed, and be started again.
"""
