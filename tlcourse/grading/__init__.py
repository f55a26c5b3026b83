"""The teacher's side: hand out, collect, grade, report and return exercises.

Who trusts whom. The parent holds questions, hidden inputs, expected answers and grades. A
submission is hostile until proven otherwise: its code runs behind two walls, receives inputs,
and returns plain data as JSON. Nothing that it says about its own grade is read.
"""
