"""What is printed of posteriors whose elements have names, as those of SPM are."""

import numpy as np
import pytest
import torch

import pyro_bmr as bmr

NAMES = ["A(1,1)", "A(2,1)", "decay"]


def posterior():
    return bmr.Posterior([0.02, 0.5, 0.1], scale=0.1, prior_scale=1.0, names=NAMES)


def test_presence_has_a_row_per_element():
    found = bmr.presence(posterior(), sites=["A"])
    table = found.parameters()
    assert list(table.index) == NAMES[:2]
    assert table["P"].tolist() == [float(found.probability[name]) for name in NAMES[:2]]
    shown = str(found)
    assert "P > 1/2" not in shown
    assert f"{table['P'].iloc[0]:.3f}" in shown
    assert "standard_error" in found._repr_html_()


def test_average_has_moments_and_no_probability_of_what_was_not_asked():
    found = bmr.average(posterior(), sites=["A"])
    table = found.parameters()
    assert list(table.index) == NAMES
    assert np.isnan(table["P"]["decay"])
    assert table["mean"]["decay"] == pytest.approx(0.1)
    assert table["sd"]["decay"] == pytest.approx(0.1)
    assert f"{table['mean']['A(2,1)']:.4g}" in str(found)


def test_arrays_keep_a_row_per_site():
    q = bmr.Posterior({"w": torch.zeros(3), "b": torch.zeros(1)}, scale=0.1, prior_scale=1.0)
    assert "P > 1/2" in str(bmr.presence(q))
    assert "P > 1/2" in str(bmr.average(q))
    assert list(bmr.presence(q).parameters().index) == ["b"]


def test_free_elements_are_printed_and_fixed_ones_are_one_line():
    names = [f"A({i})" for i in range(70)]
    scale = torch.zeros(70)
    scale[35:37] = 0.1
    q = bmr.Posterior(torch.zeros(70), scale=scale, prior_scale=(scale > 0).double(), names=names)
    shown = str(q)
    assert "A(35)" in shown
    assert "A(36)" in shown
    assert "and 68 fixed" in shown
    assert "A(34)" not in shown
    assert len(q.summary()) == 70


def test_the_warning_of_no_variance_names_the_elements():
    covariance = torch.tensor([[0.1, 0.1, 0.0], [0.1, 0.1, 0.0], [0.0, 0.0, 0.2]])
    q = bmr.Posterior(torch.zeros(3), covariance, prior_covariance=torch.eye(3), names=NAMES)
    with pytest.warns(UserWarning, match=r"1 directions, combinations of A\(1,1\), A\(2,1\), "):
        bmr.reduce(q)
