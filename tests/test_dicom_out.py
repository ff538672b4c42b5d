"""What is written for the archive is valid by dciodvfy, readable by dsrdump, highdicom and pydicom, and says what went in, at the right place."""
import json
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest

hd = pytest.importorskip("highdicom", reason="highdicom is not installed; remedy: pip install 'medimg[dicomnet]'")
pydicom = pytest.importorskip("pydicom")

from medimg.data.phantom import radiograph, thorax_phantom                     # noqa: E402
from medimg.data.phantom_dicom import write_ct, write_radiograph               # noqa: E402
from medimg.data.segmentations import read_seg                                # noqa: E402
from medimg.deployment.dicom_out import finding_code, measurements_of, possible_kinds, write_dicom      # noqa: E402
from medimg.deployment.dicom_pictures import Stamp, on_sources, read_sources, stamped_picture           # noqa: E402
from medimg.deployment.key_slices import toy_detection                         # noqa: E402
from medimg.deployment.prediction import Finding, Prediction, from_json        # noqa: E402
from medimg.errors import ConfigError, DicomError, GeometryError, MedimgError, NotDicom                 # noqa: E402

STAMP = Stamp("test", datetime(2026, 1, 2, 3, 4, 5))
MODEL = {"name": "toy", "version": "1.2", "digest": "ab" * 32, "origin": "unsigned", "signature": None}


@pytest.fixture(scope="module")
def ct(tmp_path_factory):
    """(case, folder of its series)."""
    folder = tmp_path_factory.mktemp("ct")
    case = thorax_phantom(1, shape=(40, 96, 96), spacing_mm=(7.5, 3.8, 3.8))
    write_ct(case.volume, folder, seed=1)
    return case, folder


@pytest.fixture(scope="module")
def cxr(tmp_path_factory, ct):
    """(Prediction with everything that a film can have, file)."""
    volume = radiograph(ct[0], size=128)[0]
    path = write_radiograph(volume, tmp_path_factory.mktemp("dx") / "dx.dcm", seed=1)
    y, x = np.mgrid[0:128, 0:128]
    heat = np.exp(-((y - 70) ** 2 + (x - 44) ** 2) / 500).astype("float32")
    return Prediction("answered", "dx.dcm", task="binary", classes=("normal", "pneumonia"), label="pneumonia", probability={"normal": 0.55, "pneumonia": 0.45}, threshold={"pneumonia": 0.41},
                      picture=volume.display()[0], heat_map=heat, model=MODEL, explanation=None,
                      findings=(Finding("region that moved the score", "evidence-region", score=0.7, box_yx=(50, 24, 90, 64), note="n"),)), path


def run(tool, *args):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed; remedy: apt-get install {'dicom3tools' if tool == 'dciodvfy' else 'dcmtk'}")
    done = subprocess.run([tool, *map(str, args)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def no_faults(paths):
    for path in paths:
        if path.suffix == ".dcm":
            _, said = run("dciodvfy", path)
            assert not re.findall(r"^Error.*", said, re.M), (path.name, said)


def same_patient(ds, source):
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyID", "AccessionNumber"):
        assert ds.get(keyword) == source.get(keyword), keyword
    assert ds.SeriesInstanceUID != source.SeriesInstanceUID and ds.SOPInstanceUID != source.SOPInstanceUID


def test_ct(ct, tmp_path):
    case, folder = ct
    answer = toy_detection(case)
    paths = write_dicom(answer, folder, tmp_path / "out", stamp=STAMP)
    assert [p.name for p in paths] == ["sr.dcm", "seg.dcm", "sc.dcm", "prediction.json"]
    no_faults(paths)
    sources = read_sources(folder)
    for path in paths[:3]:
        same_patient(pydicom.dcmread(path), sources[0])
    assert from_json(paths[3].read_bytes()).to_dict() == answer.to_dict()
    report = hd.sr.srread(paths[0])
    assert report.VerificationFlag == "UNVERIFIED" and report.SOPClassUID.name == "Comprehensive 3D SR Storage"
    groups, seg = report.content.get_volumetric_roi_measurement_groups(), hd.seg.segread(paths[1])
    assert len(groups) == len(answer.findings) == 3
    for k, (group, finding) in enumerate(zip(groups, answer.findings), 1):
        values = {m.name.meaning: (m.value, m.unit.value) for m in group.get_measurements()}
        assert values["Long axis"] == (finding.long_axis_mm, "mm") and values["Short axis"] == (finding.short_axis_mm, "mm") and values["Diameter"] == (finding.mean_diameter_mm, "mm")
        assert values["Volume"] == (finding.volume_mm3, "mm3") and values["Certainty of Finding"] == (pytest.approx(100 * finding.score), "%")
        assert group.tracking_identifier == f"nodule {k}" and group.finding_type.value == "27925004"
        segment = group.referenced_segment
        assert segment.referenced_sop_instance_uid == seg.SOPInstanceUID and segment.referenced_segment_numbers == [k] if hasattr(segment, "referenced_segment_numbers") else True
        assert group.tracking_uid == seg.get_segment_description(k).tracking_uid
    assert {m.name.meaning: m.value for m in groups[0].get_measurements()}["Volume doubling time"] == answer.findings[0].growth["volume_doubling_days"]
    assert {m.name.meaning: m.value for m in groups[1].get_measurements()}["Diameter of solid part"] == answer.findings[1].solid_diameter_mm
    evidence = {i.ReferencedSOPInstanceUID for key in ("CurrentRequestedProcedureEvidenceSequence", "PertinentOtherEvidenceSequence") for study in report.get(key, [])
                for series in study.ReferencedSeriesSequence for i in series.ReferencedSOPSequence}
    assert evidence >= {h.SOPInstanceUID for h in sources} | {seg.SOPInstanceUID}


def test_seg_lies_on_the_right_voxels(ct, tmp_path):
    """Read back by highdicom, by our reader, and voxel by voxel in mm, also when the volume was turned."""
    case, folder = ct
    answer = toy_detection(case)
    for name, one in (("as is", answer), ("turned", replace(answer, volume=case.volume.flip(0), mask=np.ascontiguousarray(answer.mask[::-1])))):
        path = write_dicom(one, folder, tmp_path / name, kinds=("seg",))[0]
        for k, mask in enumerate(read_seg(path, case.volume).values(), 1):
            assert np.array_equal(mask.array, answer.mask == k), (name, k)
        seg = hd.seg.segread(path)
        assert seg.SegmentationType == "BINARY"
        for k, finding in enumerate(answer.findings, 1):
            whole = seg.get_volume(segment_numbers=[k], allow_missing_positions=True)
            index = np.argwhere(whole.array.reshape(whole.array.shape[:3]))
            centre = (whole.affine @ np.append(index.mean(0), 1))[:3]
            assert np.linalg.norm(centre - finding.centroid_mm) < 4 and len(index) == (answer.mask == k).sum()
        frame = seg.PerFrameFunctionalGroupsSequence[0]
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        place = frame.PlanePositionSequence[0].ImagePositionPatient
        assert {h.SOPInstanceUID: list(h.ImagePositionPatient) for h in read_sources(folder)}[source] == list(place)


def test_radiograph(cxr, tmp_path):
    answer, file = cxr
    both = replace(answer, mask=(answer.heat_map > 0.6).astype("uint8"))
    paths = write_dicom(both, [file], tmp_path, stamp=STAMP)
    assert [p.name for p in paths] == ["sr.dcm", "seg.dcm", "sc.dcm", "pm.dcm", "prediction.json"]
    no_faults(paths)
    source = pydicom.dcmread(file)
    for path in paths[:4]:
        same_patient(pydicom.dcmread(path), source)
    groups = hd.sr.srread(paths[0]).content.get_image_measurement_groups()
    assert [(g.finding_type.meaning, g.get_measurements()[0].value) for g in groups] == [("Normal", 0.55), ("Pneumonia", 0.45)]
    assert [g.get_qualitative_evaluations()[0].value.meaning for g in groups] == ["No", "Yes"]
    assert groups[0].source_images[0].referenced_sop_instance_uid == source.SOPInstanceUID
    box = hd.sr.srread(paths[0]).content.get_planar_roi_measurement_groups()[0]
    assert box.roi.value.tolist() == [[24, 50], [64, 50], [64, 90], [24, 90], [24, 50]]
    mask = hd.seg.segread(paths[1])
    assert np.array_equal(mask.pixel_array.squeeze(), both.mask)
    pm = pydicom.dcmread(paths[3])
    assert np.array_equal(pm.pixel_array.squeeze(), both.heat_map) and pm.ContentQualification == "RESEARCH"
    assert pm.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert hd.pm.ParametricMap.from_dataset(pm).RealWorldValueMappingSequence if "RealWorldValueMappingSequence" in pm else True


def test_dsrdump_reads_the_report(ct, cxr, tmp_path):
    case, folder = ct
    for answer, source, words in ((toy_detection(case), folder, ("Imaging Measurement Report", "Long axis", "12.21", "Upper lobe of lung", "Left", "phantom truth", "Algorithm Version")),
                                  (cxr[0], [cxr[1]], ("Pneumonia", "0.45", "Probability", "POLYLINE"))):
        path = write_dicom(answer, source, tmp_path / words[0][:5], kinds=("sr",))[0]
        code, said = run("dsrdump", path)
        assert code == 0 and all(word in said for word in words), said
        no_faults([path])


def test_sr_without_masks_has_a_ring(ct, tmp_path):
    """Without a segment the place is a closed ring of the mean diameter around the centroid, in mm."""
    answer = toy_detection(ct[0])
    path = write_dicom(replace(answer, mask=None), ct[1], tmp_path, kinds=("sr",))[0]
    no_faults([path])
    for group, finding in zip(hd.sr.srread(path).content.get_planar_roi_measurement_groups(), answer.findings):
        ring = group.roi.value
        far = np.linalg.norm(ring - np.array(finding.centroid_mm), axis=1)
        assert np.allclose(2 * far, finding.mean_diameter_mm, atol=1e-3) and np.array_equal(ring[0], ring[-1]) and np.ptp(ring[:, 2]) < 1e-6


def test_segmentation_task_and_refusal(ct, tmp_path):
    case, folder = ct
    lungs = np.isin(case.labels, (2, 3)).astype("uint8")
    answer = Prediction("answered", "ct", task="segmentation", classes=("background", "lung"), volume=case.volume, mask=lungs, model=MODEL, picture=case.volume.display()[20])
    paths = write_dicom(answer, folder, tmp_path / "lungs")
    no_faults(paths)
    group = hd.sr.srread(paths[0]).content.get_volumetric_roi_measurement_groups()[0]
    assert group.finding_type.value == "39607008" and group.get_measurements()[0].value == pytest.approx(lungs.sum() * 7.5 * 3.8 * 3.8, rel=1e-6)
    refused = Prediction("refused", "ct", model=MODEL, reasons=("a stack of 40 slices, not a single picture",), picture=case.volume.display()[20])
    paths = write_dicom(refused, folder, tmp_path / "refused")
    assert [p.name for p in paths] == ["sr.dcm", "sc.dcm", "prediction.json"]
    no_faults(paths)
    assert hd.sr.srread(paths[0]).content.get_image_measurement_groups()[0].finding_type.meaning == "No answer"
    none = replace(toy_detection(case), findings=(), mask=None)
    path = write_dicom(none, folder, tmp_path / "none", kinds=("sr",))[0]
    assert hd.sr.srread(path).content.get_image_measurement_groups()[0].finding_type.meaning == "Nothing marked by model"
    no_faults([path])


def advised(case):
    """A screening answer with what Lung-RADS and the Fleischner Society say to it."""
    from medimg.deployment.recommend import recommend
    answer = toy_detection(case)
    sure = recommend(answer, {"age_years": 62, "screening": True, "prior_ct": True, "prior_category": "3", "facts": {"lungs_covered": True}})
    return replace(answer, recommendations=tuple(sure), warnings=("a warning of more than sixty-four characters, which no meaning of a code could hold in full",))


def children(item, name):
    """Values of the items of a name below an item, by pydicom alone."""
    pick = {"TEXT": lambda c: c.TextValue, "UIDREF": lambda c: c.UID, "CODE": lambda c: c.ConceptCodeSequence[0].CodeMeaning, "CONTAINER": lambda c: c}
    return [pick[c.ValueType](c) for c in item.get("ContentSequence", ()) if c.ConceptNameCodeSequence[0].CodeMeaning == name]


def test_recommendations_by_pydicom_and_highdicom(ct, tmp_path):
    """Each recommendation once, in the section that CID 7001 names, with all that the record holds; the groups of TID 1500 are read as before."""
    answer = advised(ct[0])
    paths = write_dicom(answer, ct[1], tmp_path, kinds=("sr", "seg"), stamp=STAMP)
    no_faults(paths)
    ds = pydicom.dcmread(paths[0])
    [section] = children(ds, "Recommendations")
    name = section.ConceptNameCodeSequence[0]
    assert (name.CodeValue, name.CodingSchemeDesignator) == ("18783-1", "LN")
    assert {c.ConceptNameCodeSequence[0].CodeValue for c in section.ContentSequence} == {"121075"} and len(section.ContentSequence) == len(answer.recommendations) == 2
    by = {children(item, "Guideline and edition")[0]: item for item in section.ContentSequence}
    for one in answer.recommendations:
        item = by[f"{one['guideline']}, {one['edition']}"]
        assert item.TextValue == one["text"] and children(item, "State") == [one["status"]] and children(item, "Rule") == [one["rule"]] and children(item, "Place in guideline") == [one["source"]]
        assert children(item, "Fact missing") == [n.replace("_", " ") for n in one["inputs_missing"]] and children(item, "Reason") == ([one["reason"]] if one["reason"] else [])
        assert len(children(item, "Fact used")) == len(one["inputs_used"]) and children(item, "Comment") == ["for the clinician's decision"]
        assert [m.endswith(f"category {one['category']}") for m in children(item, "Category")] == ([True] if one["category"] else [])
        groups = hd.sr.srread(paths[0]).content.get_volumetric_roi_measurement_groups()
        linked = [] if one["finding"] is None else [groups[one["finding"]]]
        assert children(item, "Tracking Unique Identifier") == [g.tracking_uid for g in linked] and children(item, "Tracking Identifier") == [g.tracking_identifier for g in linked]
    found = hd.sr.utils.find_content_items(hd.sr.srread(paths[0]), name=hd.sr.CodedConcept("121075", "DCM", "Recommendation"), recursive=True)
    assert sorted(i.value for i in found) == sorted(r["text"] for r in answer.recommendations) and len(groups) == 3
    [evaluations] = children(ds, "Qualitative Evaluations")
    assert children(evaluations, "Warning") == list(answer.warnings) and any("not the probability of cancer" in line for line in children(evaluations, "What the numbers say"))
    assert [i.CodingSchemeDesignator for i in ds.CodingSchemeIdentificationSequence] == ["99MEDIMG"]


def test_recommendations_by_dcmtk(ct, tmp_path):
    path = write_dicom(advised(ct[0]), ct[1], tmp_path, kinds=("sr",), stamp=STAMP)[0]
    code, said = run("dsrdump", "+Pl", path)
    assert code == 0 and all(word in said for word in ("Recommendations", "ACR Lung-RADS, v2022", "has properties CODE", "inferred from TEXT", "for the clinician's decision"))
    code, said = run("dsr2html", path, tmp_path / "sr.html")
    page = (tmp_path / "sr.html").read_text(encoding="utf-8")
    assert code == 0 and "Recommendations" in page and "ACR Lung-RADS, v2022" in page and "which no meaning of a code could hold in full" in page


def test_growth_and_shrinkage(ct):
    names = lambda days: {row[0][2]: row[1] for row in measurements_of(Finding("nodule", "solid", growth={"relation": "matched", "interval_days": 90, "prior_volume_mm3": 100.0,  # noqa: E731
                                                                                                           "prior_mean_diameter_mm": 5.8, "volume_doubling_days": days}))}
    assert names(120.0) == {"Volume at prior": 100.0, "Diameter at prior": 5.8, "Days since prior": 90.0, "Volume doubling time": 120.0}
    assert names(-120.0)["Volume halving time"] == 120.0 and "Volume doubling time" not in names(-120.0)
    assert not {"Volume doubling time", "Volume halving time"} & set(names(None))


def test_private_codes_do_not_collide():
    """Two meanings never share a value of at most 16 characters, also where they begin alike or are not Latin."""
    meanings = [f"a category of the guideline, number {k}" for k in range(50)] + ["结节", "肿块", "Volume doubling time", "Volume halving time"]
    rows = [finding_code(m) for m in meanings]
    assert len({value for value, _, _ in rows}) == len(meanings) and all(len(value) <= 16 and value.isascii() for value, _, _ in rows)


@pytest.mark.parametrize("kept", [("pneumonia",), ("normal", "pneumonia"), ()])
def test_prediction_set(cxr, tmp_path, kept):
    answer = replace(cxr[0], prediction_set=kept, uncertainty={"entropy_bits": 0.9, "note": "", "level": 0.9})
    path = write_dicom(replace(answer), [cxr[1]], tmp_path, kinds=("sr",))[0]
    no_faults([path])
    [group] = [g for g in hd.sr.srread(path).content.get_image_measurement_groups() if g.finding_type.meaning == "Prediction set"]
    assert [e.value.meaning.lower() for e in group.get_qualitative_evaluations()] == (list(kept) or ["none"]) and group.get_measurements()[0].value == 0.9


def test_same_stamp_same_bytes(ct, cxr, tmp_path):
    for name, answer, source in (("ct", toy_detection(ct[0]), ct[1]), ("dx", cxr[0], [cxr[1]])):
        one, two, other = (write_dicom(answer, source, tmp_path / name / str(k), stamp=s) for k, s in enumerate((STAMP, STAMP, None)))
        assert [a.read_bytes() for a in one] == [b.read_bytes() for b in two]
        names = [{pydicom.dcmread(p).SOPInstanceUID for p in paths if p.suffix == ".dcm"} for paths in (one, other)]
        assert not names[0] & names[1] and len(names[0]) == len(one) - 1
        assert all("20260102" == pydicom.dcmread(p).InstanceCreationDate for p in one if p.suffix == ".dcm")


def test_warning_is_in_the_pixels(ct, cxr, tmp_path):
    path = write_dicom(cxr[0], [cxr[1]], tmp_path, kinds=("sc",))[0]
    ds = pydicom.dcmread(path)
    assert ds.BurnedInAnnotation == "YES" and "not for diagnosis" in ds.ImageComments and [i.ReferencedSOPInstanceUID for i in ds.SourceImageSequence] == [pydicom.dcmread(cxr[1]).SOPInstanceUID]
    picture = ds.pixel_array
    band = picture[:44]
    assert ((band[..., 0] > 120) & (band[..., 1] < 60)).mean() > 0.6 and (band.min(-1) > 200).mean() > 0.02          # red with white letters
    changed = stamped_picture(cxr[0]) != stamped_picture(replace(cxr[0], label="normal"))
    assert changed.any() and not changed[:44].any()
    if shutil.which("fc-match"):
        assert stamped_picture(toy_detection(ct[0]), lang="zh").shape == stamped_picture(toy_detection(ct[0])).shape


def test_hostile_names(cxr, tmp_path):
    """Text from strangers in labels, models and reasons: valid objects, no control characters."""
    evil = "\u202e<script>^\\x1b[31m" + "\x1b\x00\n" + "x" * 200
    answer = replace(cxr[0], label=evil, probability={evil: 0.5, "b\\c": 0.5}, model={**MODEL, "name": evil, "version": evil}, classes=(evil, "b\\c"), mask=(cxr[0].heat_map > 0.5).astype("uint8"),
                     findings=(Finding(evil, evil, score=0.5, box_yx=(1, 1, 5, 5), note=evil),))
    paths = write_dicom(answer, [cxr[1]], tmp_path, kinds=("sr", "seg", "sc", "pm"))
    for path in paths:
        assert "\x1b" not in str(pydicom.dcmread(path)) and "\u202e" not in str(pydicom.dcmread(path))
    no_faults(paths)


@pytest.mark.parametrize("kind", ["sr", "seg", "sc", "pm"])
def test_no_answer_is_written_into_another_series(kind, ct, tmp_path):
    """Same shape, same place, another patient: only the UID of the series tells; nothing is written, whatever the kind."""
    case, folder = ct
    answer, neighbour = toy_detection(case), read_sources(folder)
    own = replace(answer, study={**answer.study, "series_uid": str(neighbour[0].SeriesInstanceUID)}, heat_map=(answer.mask > 0).astype("float32"))
    assert [p.name for p in write_dicom(own, folder, tmp_path / "own", kinds=(kind,))] == [f"{kind}.dcm"]
    for h in neighbour:
        h.PatientID, h.StudyInstanceUID, h.SeriesInstanceUID = "another", "2.25.8", "2.25.7"
    with pytest.raises(DicomError, match="2.25.7"):
        write_dicom(own, neighbour, tmp_path / "out", kinds=(kind,))
    assert not (tmp_path / "out").exists()


def test_all_or_none(ct, cxr, tmp_path, monkeypatch):
    case, folder = ct
    answer, out = toy_detection(case), tmp_path / "out"
    moved = read_sources(folder)
    for h in moved:
        h.ImagePositionPatient = [*h.ImagePositionPatient[:2], h.ImagePositionPatient[2] + 30.5]
    (tmp_path / "text.dcm").write_text("no dicom")
    for error, args, kinds in ((GeometryError, (answer, sorted(folder.iterdir())[:-1]), None), (GeometryError, (answer, moved), None), (GeometryError, (answer, [cxr[1]]), None),
                               (DicomError, (answer, []), None), (DicomError, (answer, [*sorted(folder.iterdir()), cxr[1]]), None), (NotDicom, (answer, [tmp_path / "text.dcm"]), None),
                               (ConfigError, (cxr[0], [cxr[1]]), ("seg",)), (ConfigError, (cxr[0], [cxr[1]]), ("gif",)), (ConfigError, (cxr[0], [cxr[1]]), ())):
        with pytest.raises(error):
            write_dicom(*args, out, kinds)
        assert not out.exists()
    error = Prediction("error", "x", error={"type": "E", "what": "w", "remedy": None})
    assert possible_kinds(error) == ("json",) and [p.name for p in write_dicom(error, [], tmp_path / "e")] == ["prediction.json"]
    assert json.loads((tmp_path / "e" / "prediction.json").read_text())["status"] == "error"
    import medimg.deployment.dicom_out as module
    real, calls = module.atomic_path, []

    def failing(path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(path)
    monkeypatch.setattr(module, "atomic_path", failing)
    with pytest.raises(OSError, match="No space"):
        write_dicom(answer, folder, out)
    assert list(out.iterdir()) == []


def test_pieces(ct):
    assert finding_code("lung_left")[0] == "44029006" and finding_code("x y")[1] == "99MEDIMG"
    assert measurements_of(Finding("a", "b")) == []
    case, folder = ct
    headers = read_sources(list(reversed(sorted(folder.iterdir()))))
    assert [h.ImagePositionPatient[2] for h in headers] == sorted(h.ImagePositionPatient[2] for h in headers) and "PixelData" not in headers[0]
    datasets = [pydicom.dcmread(f) for f in folder.iterdir()]
    assert [h.SOPInstanceUID for h in read_sources(datasets)] == [h.SOPInstanceUID for h in headers] and "PixelData" in datasets[0]
    assert on_sources(case.labels, toy_detection(case), headers).shape == case.labels.shape
    with pytest.raises(MedimgError):
        stamped_picture(Prediction("answered", "a"))
