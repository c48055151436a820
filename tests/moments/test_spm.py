"""Files of SPM, against what scipy reads, flattened by hand, and against the layout of version 7.3.

The data come from `PYRO_BMR_DATA`; the other files are written here.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat
from scipy.sparse import csc_array

import pyro_bmr as bmr

ROOT = Path(__file__).parents[2]
DCM = Path(os.environ.get("PYRO_BMR_DATA", ROOT.parent / "shared" / "data")) / "dcm"
needs_data = pytest.mark.skipif(not DCM.is_dir(), reason="no DCM files; set PYRO_BMR_DATA")


def column(array):
    return np.asarray(array.toarray() if hasattr(array, "toarray") else array, float).ravel("F")


@needs_data
def test_a_struct_with_three_axes_and_sparse_vectors():
    dcm = loadmat(DCM / "fmri_b.mat")["DCM"][0, 0]
    ep, prior = dcm["Ep"][0, 0], dcm["M"]["pE"][0, 0][0, 0]
    fields = ["A", "B", "C", "D", "slope", "half", "transit", "decay", "epsilon"]
    assert list(ep.dtype.names) == fields
    posterior = bmr.read_spm(DCM / "fmri_b.mat")
    np.testing.assert_array_equal(posterior.mean, np.hstack([column(ep[f]) for f in fields]))
    np.testing.assert_array_equal(
        posterior.prior_mean, np.hstack([column(prior[f]) for f in fields])
    )
    np.testing.assert_allclose(posterior.covariance, dcm["Cp"].toarray(), atol=1e-12)
    np.testing.assert_allclose(posterior.prior_covariance, dcm["M"]["pC"][0, 0], atol=1e-12)
    assert posterior.free_energy == pytest.approx(3411.8668551397564)
    assert int(posterior.free.sum()) == 17
    means = dict(zip(posterior.names, posterior.mean.tolist(), strict=True))
    assert means["A(2,1)"] == ep["A"][1, 0]
    assert means["B(1,2,3)"] == ep["B"][0, 1, 2]
    assert means["transit(3)"] == ep["transit"].toarray()[2, 0]
    assert means["decay"] == ep["decay"].toarray()[0, 0]
    assert len(means) == 52


@needs_data
def test_cells_within_structs_and_a_struct_of_variances():
    dcm = loadmat(DCM / "fmri_a.mat")["DCM"][0, 0]

    def by_hand(top):
        n, h = top["N"][0, 0], top["H"][0, 0]
        cells = [*n["A"].flat, *n["B"].flat]
        rest = [n[f] for f in "CTGDSR"] + [top["J"]] + [h[f] for f in h.dtype.names]
        return np.hstack([column(part) for part in cells + rest])

    posterior = bmr.read_spm(DCM / "fmri_a.mat")
    ep, model = dcm["Ep"][0, 0], dcm["M"][0, 0]
    np.testing.assert_array_equal(posterior.mean, by_hand(ep))
    np.testing.assert_array_equal(posterior.prior_mean, by_hand(model["pE"][0, 0]))
    variances = posterior.prior_covariance.diagonal()
    np.testing.assert_array_equal(variances, by_hand(model["pC"][0, 0]))
    assert (posterior.prior_covariance == variances.diag()).all()
    means = dict(zip(posterior.names, posterior.mean.tolist(), strict=True))
    assert means["N.A{2}(3,1)"] == ep["N"][0, 0]["A"][0, 1][2, 0]
    assert means["N.B{1}(1,2,3)"] == ep["N"][0, 0]["B"][0, 0][0, 1, 2]
    assert means["H.decay(2)"] == ep["H"][0, 0]["decay"].toarray()[1, 0]
    assert means["N.S"] == ep["N"][0, 0]["S"][0, 0]


@needs_data
@pytest.mark.parametrize(
    ("name", "size", "free"), [("erp_a", 196, 43), ("eeg_correlated_prior", 74, 34)]
)
def test_the_other_two(name, size, free):
    dcm = loadmat(DCM / f"{name}.mat")["DCM"][0, 0]
    posterior = bmr.read_spm(DCM / f"{name}.mat")
    assert (posterior.layout.size, int(posterior.free.sum())) == (size, free)
    saved = dcm["Cp"].toarray()  # not quite symmetric
    np.testing.assert_allclose(posterior.covariance, (saved + saved.T) / 2, rtol=1e-12)
    assert posterior.free_energy == -dcm["F"].item()
    means = dict(zip(posterior.names, posterior.mean.tolist(), strict=True))
    assert means["A{3}" if name[:3] == "eeg" else "A{3}(1,1)"] == -32
    if name == "eeg_correlated_prior":
        prior = dcm["M"]["pC"][0, 0].toarray()
        np.testing.assert_allclose(posterior.prior_covariance, prior, rtol=1e-9, atol=1e-12)
        assert abs(prior - np.diag(prior.diagonal())).max() > 0


def a_dcm(**changes):
    """A model of seven elements; MATLAB keeps the fields in this order, and HDF5 sorts them."""
    ep = {"C": np.array([[1.0, 2.0, 3.0]]), "A": np.empty(2, object), "d": 6.0}
    ep["A"][:] = [np.array([[4.0], [5.0]]), 7.0]
    root = np.random.default_rng(0).normal(size=(7, 7))
    model = {"pE": ep | {"C": np.zeros((1, 3))}, "pC": csc_array(np.diag([0.0, *range(1, 7)]))}
    dcm = {"Ep": ep, "Cp": root @ root.T, "M": model, "F": -3.0, "name": "one"}
    return dcm | changes


A_MEAN = [1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 6.0]
A_NAMES = ("C(1)", "C(2)", "C(3)", "A{1}(1)", "A{1}(2)", "A{2}", "d")


def check_a_dcm(posterior):
    assert posterior.names == A_NAMES
    assert posterior.mean.tolist() == A_MEAN
    assert posterior.prior_mean.tolist() == [0.0, 0.0, 0.0, 4.0, 5.0, 7.0, 6.0]
    assert posterior.prior_covariance.diagonal().tolist() == [0.0, *range(1, 7)]
    np.testing.assert_allclose(posterior.covariance, a_dcm()["Cp"], rtol=1e-12)
    assert posterior.free_energy == 3.0
    assert posterior.free.tolist() == [False] + [True] * 6


@pytest.mark.parametrize("variances", ["vector", "struct", "matrix"])
def test_what_the_prior_covariance_may_be(tmp_path, variances):
    cells = np.empty(2, object)
    cells[:] = [np.array([[3.0, 4.0]]), 5.0]
    forms = {
        "vector": np.arange(7.0)[:, None],
        "struct": {"C": np.array([0, 1, 2], np.uint8), "A": cells, "d": 6.0},
        "matrix": np.diag(np.arange(7.0)),
    }
    dcm = a_dcm()
    savemat(tmp_path / "DCM.mat", {"DCM": dcm | {"M": dcm["M"] | {"pC": forms[variances]}}})
    check_a_dcm(bmr.read_spm(tmp_path / "DCM.mat"))


def a_group():
    means = np.array([[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]])
    return {
        "Ep": means,
        "Cp": csc_array(np.diag(np.arange(1.0, 7.0))),
        "Pnames": np.array(["A(1,1)", "A(2,1)", "B(1,2,3)"], object)[:, None],
        "Xnames": np.array([["mean", "group"]], object),
        "M": {"pE": np.zeros((6, 1)), "pC": np.eye(6) * 2, "X": np.ones((5, 2))},
        "F": -12.0,
    }


def check_a_group(posterior):
    assert posterior.names[:4] == (
        "A(1,1) × mean",
        "A(2,1) × mean",
        "B(1,2,3) × mean",
        "A(1,1) × group",
    )
    assert posterior.mean.tolist() == [1, 2, 3, -1, -2, -3]
    assert posterior.covariance.diagonal().tolist() == [1, 2, 3, 4, 5, 6]
    assert posterior.prior_covariance.diagonal().tolist() == [2] * 6
    assert posterior.free_energy == 12


def test_a_group_level(tmp_path):
    path = tmp_path / "PEB.mat"
    savemat(path, {"PEB": a_group()})
    check_a_group(bmr.read_spm(path))
    unnamed = {name: value for name, value in a_group().items() if name != "Xnames"}
    savemat(path, {"PEB": unnamed})
    assert bmr.read_spm(path).names[3] == "A(1,1) × Covariate 2"
    savemat(path, {"PEB": a_group() | {"Pnames": np.array(["A", "B"], object)}})
    with pytest.raises(ValueError, match="Ep of shape .3, 2. for 2 Pnames and 2 Xnames"):
        bmr.read_spm(path)


def test_one_of_several(tmp_path):
    path = tmp_path / "GCM.mat"
    cells = np.empty((2, 2), object)
    for i, f in enumerate([-1.0, -2.0, -3.0, -4.0]):
        cells[i % 2, i // 2] = a_dcm(F=f)
    savemat(path, {"GCM": cells})
    with pytest.raises(ValueError, match="GCM with 4 entries. Expected index= .* from 0 to 3"):
        bmr.read_spm(path)
    assert [bmr.read_spm(path, index=i).free_energy for i in range(4)] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="index=4"):
        bmr.read_spm(path, index=4)
    savemat(path, {"RCM": cells, "PEB": a_group()})
    assert bmr.read_spm(path, index=2).free_energy == 3
    check_a_group(bmr.read_spm(path))
    cells[:] = "DCM_subject.mat"
    savemat(path, {"GCM": cells})
    with pytest.raises(ValueError, match=r"the name of a file, 'DCM_subject.mat'"):
        bmr.read_spm(path, index=1)


def test_files_that_hold_no_posterior(tmp_path):
    path = tmp_path / "one.mat"
    whole = a_dcm()
    without = {name: value for name, value in whole.items() if name != "Cp"}
    short = whole | {"M": whole["M"] | {"pE": np.zeros(3)}}
    for contents, message in [
        ({"DCM": without}, "without Cp. Expected an estimated model"),
        ({"DCM": whole | {"M": {}}}, "without M.pE, M.pC"),
        ({"DCM": short}, "M.pE of 3 elements. Expected 7"),
        ({"DCM": whole | {"Cp": np.eye(3)}}, "Cp of 9 elements. Expected 7"),
        ({"x": 1.0, "y": 2.0}, r"a file with \['x', 'y'\]"),
        ({"x": 1.0}, "x that is no struct"),
    ]:
        savemat(path, contents)
        with pytest.raises(ValueError, match=message):
            bmr.read_spm(path)
    savemat(path, {"DCM": whole})
    with pytest.raises(ValueError, match="index=2. Expected None: DCM is one model"):
        bmr.read_spm(path, index=2)
    path.write_text("no MATLAB file")
    with pytest.raises(ValueError, match="could not read .*one.mat"):
        bmr.read_spm(path)
    with pytest.raises(FileNotFoundError):
        bmr.read_spm(tmp_path / "none.mat")
    with pytest.raises(TypeError, match="path=3"):
        bmr.read_spm(3)


class Version73:
    """A writer of the layout of MATLAB's version 7.3, for what `a_dcm` and `a_group` hold."""

    def __init__(self, h5py, file, *, fields=True):
        self.h5py, self.file, self.fields = h5py, file, fields
        self.references = file.create_group("#refs#")

    def write(self, group, name, value):
        if isinstance(value, dict):
            node = group.create_group(name)
            node.attrs["MATLAB_class"] = np.bytes_("struct")
            if self.fields:
                letters = self.h5py.vlen_dtype(np.dtype("S1"))
                names = np.empty(len(value), object)
                for i, field in enumerate(value):
                    names[i] = np.array([letter.encode() for letter in field], "S1")
                node.attrs.create("MATLAB_fields", names, dtype=letters)
            for field, one in value.items():
                self.write(node, field, one)
        elif hasattr(value, "indptr"):
            node = group.create_group(name)
            node.attrs["MATLAB_class"] = np.bytes_("double")
            node.attrs["MATLAB_sparse"] = np.uint64(value.shape[0])
            node["jc"] = value.indptr.astype(np.uint64)
            if value.nnz:
                node["data"], node["ir"] = value.data, value.indices.astype(np.uint64)
        elif isinstance(value, str):
            letters = np.array([[ord(letter)] for letter in value], np.uint16)
            group.create_dataset(name, data=letters).attrs["MATLAB_class"] = np.bytes_("char")
        else:
            array = np.asarray(value)
            array = array.reshape(1, -1) if array.ndim < 2 else array
            if array.dtype == object:
                node = group.create_dataset(name, array.T.shape, dtype=self.h5py.ref_dtype)
                for index, one in np.ndenumerate(array.T):
                    self.write(self.references, label := str(len(self.references)), one)
                    node[index] = self.references[label].ref
                node.attrs["MATLAB_class"] = np.bytes_("cell")
            elif not array.size:
                node = group.create_dataset(name, data=np.array(array.shape, np.uint64))
                node.attrs["MATLAB_class"] = np.bytes_("double")
                node.attrs["MATLAB_empty"] = np.uint8(1)
            else:
                node = group.create_dataset(name, data=array.T)
                node.attrs["MATLAB_class"] = np.bytes_("double")


def write_73(path, contents, **options):
    h5py = pytest.importorskip("h5py", reason="files of version 7.3 are read through h5py")
    with h5py.File(path, "w", userblock_size=512) as file:
        writer = Version73(h5py, file, **options)
        for name, value in contents.items():
            writer.write(file, name, value)
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
    with open(path, "r+b") as file:
        file.write(head)


def test_version_73(tmp_path):
    path = tmp_path / "DCM.mat"
    dcm = a_dcm()
    dcm["Ep"]["D"] = np.zeros((3, 3, 0))
    write_73(path, {"DCM": dcm})
    check_a_dcm(bmr.read_spm(path))
    write_73(path, {"PEB": a_group()})
    check_a_group(bmr.read_spm(path))
    cells = np.empty((1, 2), object)
    cells[0, :] = [a_dcm(F=-1.0), a_dcm()]
    write_73(path, {"GCM": cells})
    check_a_dcm(bmr.read_spm(path, index=1))
    three = np.arange(24.0).reshape(2, 3, 4)
    one = {"Ep": {"B": three}, "Cp": np.eye(24), "M": {"pE": {"B": three}, "pC": np.ones(24)}}
    write_73(path, {"DCM": one})
    posterior = bmr.read_spm(path)
    means = dict(zip(posterior.names, posterior.mean.tolist(), strict=True))
    assert means["B(2,1,3)"] == three[1, 0, 2]
    assert posterior.free_energy is None


@needs_data
@pytest.mark.parametrize("name", ["fmri_a", "erp_a", "eeg_correlated_prior"])
def test_a_file_saved_again_in_version_73(name, tmp_path):
    def plain(value):
        if hasattr(value, "toarray"):
            return csc_array(value)
        if value.dtype.names:
            return {field: plain(value[0, 0][field]) for field in value.dtype.names}
        if value.dtype == object:
            cells = np.empty(value.shape, object)
            for index, one in np.ndenumerate(value):
                cells[index] = plain(one)
            return cells
        return value

    write_73(tmp_path / "DCM.mat", {"DCM": plain(loadmat(DCM / f"{name}.mat")["DCM"])})
    again, first = bmr.read_spm(tmp_path / "DCM.mat"), bmr.read_spm(DCM / f"{name}.mat")
    assert again.names == first.names
    assert (again.mean == first.mean).all()
    assert (again.covariance == first.covariance).all()
    assert (again.prior_covariance == first.prior_covariance).all()


def test_version_73_without_the_order_of_fields(tmp_path):
    write_73(tmp_path / "DCM.mat", {"DCM": a_dcm()}, fields=False)
    with pytest.raises(ValueError, match=r"order of its fields \['A', 'C', 'd'\]"):
        bmr.read_spm(tmp_path / "DCM.mat")


def test_version_73_without_h5py(tmp_path, monkeypatch):
    write_73(tmp_path / "DCM.mat", {"DCM": a_dcm()})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="pip install h5py.*save.*-v7"):
        bmr.read_spm(tmp_path / "DCM.mat")


def test_an_array_of_structs_is_stacked_field_by_field(tmp_path):
    structs = np.zeros((1, 2), [("a", object), ("b", object)])
    structs[0, 0], structs[0, 1] = (1.0, 2.0), (3.0, 4.0)
    dcm = {"Ep": {"s": structs}, "Cp": np.eye(4), "M": {"pE": np.zeros(4), "pC": np.ones(4)}}
    savemat(tmp_path / "DCM.mat", {"DCM": dcm})
    posterior = bmr.read_spm(tmp_path / "DCM.mat")
    assert posterior.names == ("s(1).a", "s(2).a", "s(1).b", "s(2).b")
    assert posterior.mean.tolist() == [1, 3, 2, 4]
