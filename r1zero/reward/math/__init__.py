r"""Mathematics of answers, read and compared. Two doors, and nothing else is imported from outside:

grade   `same(gold, given)`, and `is_copied(question, gold, given)`. Loads sympy, so only the
        processes of the reward executor and tools that compare import it.
gold    what a data set calls the right answer, and whether it looks like one: `read_gold`,
        `survey_golds`, ... Loads no sympy: every rank reads data.

How two texts become a verdict. Each line calls the next; in brackets, what helps it:

    grade       same(r"$\dfrac12\text{ m}$", r"50\,cm")
    reading       read: each side becomes a Reading, all that it may mean
    normalize       clean: "\frac12\text{ m}" and "50 cm"  [conditions: "for all n" behind it]
    answers         readings: one of answer_types.py each   [labels: "x =", words, number_words]
    scalars           read_scalar: a formula and its unit   [units: metres, of size 1; cm, of 1/100]
    expression          parse: div(1, 2) and 50, a tree     [tokens: its words, and the tree's Node]
    multiple_choice same_text: letters and words; None, as these are neither
    compare         same_answer: Scalar beside Scalar, so values beside values, in one unit
    units             scales: what each side is multiplied by
    formulas          same_formula: equal values, at some points where letters stand for numbers
    values              evaluate: Fraction(1, 2) metres; exact, or 60 digits where it cannot be
    real_sets         same_real_set: intervals and inequalities, as unions of intervals
    relations         same_relation: equations, up to a factor
    algebra         same_algebra: what we cannot read, such as integrals, by math-verify and sympy

The verdict is True, as 1/2 m is 50 cm. copied.py asks of such an answer whether the question
already has it, as a piece that the right answer is written otherwise than.
"""
