"""The figures of docs/reliability.md: each module measures one of them, as a test and as a program.

python -m tests.reliability.fuzz --cases 20000
python -m tests.reliability.kills --points 200
python -m tests.reliability.histories --count 500
python -m tests.reliability.writers --saves 200
"""
