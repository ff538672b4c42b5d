"""DICOMweb as independent clients see it: dicomweb-client brings, finds and fetches; bytes and pixels come back as they went; bad instances get their codes."""
import hashlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from dicomweb_client.api import DICOMwebClient
from pydicom.data import get_testdata_file
from running import Running

from medimg.deployment.bundle import toy_bundle, toy_images
from medimg.plots import png_bytes

PNG = png_bytes(toy_images(2, seed=5)[0][1])
NAMES = ("CT_small.dcm", "MR_small_RLE.dcm", "SC_rgb_rle_2frame.dcm", "JPEG2000.dcm")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dicomweb")
    running = Running(folder, bundle=toy_bundle(folder / "toy").path)
    yield running
    assert running.stop() == 0
    assert "Traceback" not in "".join(running.log)


@pytest.fixture(scope="module")
def outside(service):
    """The independent client."""
    return DICOMwebClient(f"{service.base}/dicom-web", headers={"Authorization": f"Bearer {service.key}"})


@pytest.fixture(scope="module")
def stored(outside):
    datasets = {name: pydicom.dcmread(get_testdata_file(name)) for name in NAMES}
    for ds in datasets.values():
        outside.store_instances([ds])
    return datasets


def place(ds):
    return ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID


def related(parts, boundary="b", kind="application/dicom"):
    body = b"".join(b"--b\r\nContent-Type: %s\r\n\r\n%s\r\n" % (kind.encode(), part) for part in parts) + b"--b--\r\n"
    return {"content": body, "headers": {"content-type": f'multipart/related; type="application/dicom"; boundary={boundary}'}}


def test_it_finds_what_was_brought(outside, stored):
    studies = outside.search_for_studies()
    assert {s["0020000D"]["Value"][0] for s in studies} >= {ds.StudyInstanceUID for ds in stored.values()}
    ct = stored["CT_small.dcm"]
    found = outside.search_for_studies(search_filters={"PatientID": "1CT1"})
    assert len(found) == 1 and found[0]["00100010"]["Value"][0]["Alphabetic"] == str(ct.PatientName) and found[0]["00080061"]["Value"] == ["CT"]
    assert outside.search_for_studies(search_filters={"PatientID": "nobody"}) == []
    assert outside.search_for_series(ct.StudyInstanceUID)[0]["0020000E"]["Value"] == [ct.SeriesInstanceUID]
    assert outside.search_for_series(search_filters={"Modality": "CT"})[0]["00080060"]["Value"] == ["CT"]
    assert outside.search_for_instances(*place(ct)[:2])[0]["00080018"]["Value"] == [ct.SOPInstanceUID]
    assert len(outside.search_for_studies(limit=2)) == 2 and len(outside.search_for_studies(offset=1)) == len(studies) - 1


@pytest.mark.parametrize("name", NAMES)
def test_bytes_come_back_as_they_went(service, outside, stored, name):
    out = io.BytesIO()
    ds = stored[name]
    pydicom.dcmwrite(out, ds)
    kept = next(Path(service.settings.store, "instances", *place(ds)[:2]).glob(f"{ds.SOPInstanceUID}-*.dcm")).read_bytes()
    with service.client() as client:
        answer = client.get("/dicom-web/studies/{}/series/{}/instances/{}".format(*place(ds)), headers={"accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'})
        boundary = answer.headers["content-type"].rpartition("boundary=")[2].encode()
        part = answer.content.split(b"--" + boundary)[1].partition(b"\r\n\r\n")[2][:-2]
    assert hashlib.sha256(part).hexdigest() == hashlib.sha256(kept).hexdigest()
    back = outside.retrieve_instance(*place(ds))
    assert back == ds and np.array_equal(back.pixel_array, ds.pixel_array)


def test_a_study_and_a_series_come_whole(outside, stored):
    ct = stored["CT_small.dcm"]
    assert [ds.SOPInstanceUID for ds in outside.retrieve_study(ct.StudyInstanceUID)] == [ct.SOPInstanceUID]
    assert outside.retrieve_series(*place(ct)[:2])[0] == ct


def test_headers_and_long_values(service, outside, stored):
    ct = stored["CT_small.dcm"]
    header = outside.retrieve_instance_metadata(*place(ct))
    ds = pydicom.Dataset.from_json(header, bulk_data_uri_handler=lambda uri: None)
    assert ds.PatientID == ct.PatientID and ds.PixelSpacing == ct.PixelSpacing and [e.tag for e in ds] == [e.tag for e in ct]
    assert header["7FE00010"]["BulkDataURI"].endswith("/bulkdata/7FE00010") and "InlineBinary" not in header["7FE00010"]
    assert outside.retrieve_bulkdata(header["7FE00010"]["BulkDataURI"])[0] == ct.PixelData
    assert len(outside.retrieve_study_metadata(ct.StudyInstanceUID)) == len(outside.retrieve_series_metadata(*place(ct)[:2])) == 1


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small_RLE.dcm", "SC_rgb_rle_2frame.dcm"])
def test_frames_are_the_pixels(outside, stored, name):
    ds = stored[name]
    n = int(ds.get("NumberOfFrames", 1))
    frames = outside.retrieve_instance_frames(*place(ds), frame_numbers=list(range(1, n + 1)), media_types=("application/octet-stream",))
    wanted = ds.pixel_array.reshape(n, -1)
    assert [np.frombuffer(f, ds.pixel_array.dtype).tolist() for f in frames] == wanted.tolist()


@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_pictures_for_a_browser(service, outside, stored, form):
    from medimg.data.dicom import read
    ct = stored["CT_small.dcm"]
    data = outside.retrieve_instance_rendered(*place(ct), media_types=(f"image/{form}",))
    picture, shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED), read([get_testdata_file("CT_small.dcm")]).display()[0]
    assert picture.shape == shown.shape and (np.array_equal(picture, shown) if form == "png" else np.abs(picture.astype(int) - shown).mean() < 3)
    with service.client() as client:
        url = "/dicom-web/studies/{}/series/{}/instances/{}".format(*place(ct))
        narrow = client.get(f"{url}/rendered?window=40,80,linear", headers={"accept": "image/png"})
        assert narrow.headers["content-type"] == "image/png" and narrow.content != data
        assert client.get(f"{url}/frames/1/rendered", headers={"accept": f"image/{form}"}).content == data
        for more, status in (("/rendered?window=a", 400), ("/frames/2/rendered", 404), ("/frames/0", 404), ("/frames/x", 400), ("/bulkdata/00100010", 404), ("/bulkdata/zz", 400)):
            assert client.get(url + more).status_code == status, more
        assert client.get(f"{url}/rendered", headers={"accept": "text/html"}).status_code == client.get(url, headers={"accept": "image/gif"}).status_code == 406


def fresh():
    """An instance that nobody else has."""
    ds = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    out = io.BytesIO()
    ds.save_as(out)
    return out.getvalue()


def codes(answer):
    return [hex(i["00081197"]["Value"][0]) for tag in ("00081198", "0008119A") for i in answer.json().get(tag, {}).get("Value", [])]


def test_stow_says_which_were_kept(service, stored):
    ct, changed = Path(get_testdata_file("CT_small.dcm")).read_bytes(), bytearray(Path(get_testdata_file("CT_small.dcm")).read_bytes())
    changed[-200] ^= 1
    mr = fresh()
    with service.client() as client:
        def stow(*parts, path="/dicom-web/studies", **kind):
            return client.post(path, **related(parts, **kind))
        good = stow(mr)
        assert good.status_code == 200 and good.headers["content-type"] == "application/dicom+json" and good.json()["00081199"]["Value"][0]["00081190"]["Value"][0].startswith(service.base)
        some = stow(mr, ct[:300], bytes(changed))
        assert some.status_code == 202 and codes(some) == ["0x111", "0xc000"] and some.json()["00081198"]["Value"][0]["00081155"]["Value"] == [stored["CT_small.dcm"].SOPInstanceUID]
        assert stow(b"x" * 400).status_code == 409 and codes(stow(b"x" * 400)) == ["0xc000"]
        assert codes(stow(mr, path="/dicom-web/studies/1.2.3")) == ["0xa900"] and stow(mr, path="/dicom-web/studies/1.2.3").status_code == 409
        assert stow(mr, kind="text/plain").status_code == 409
        for more, status in (({"headers": {"content-type": "application/json"}, "content": b"{}"}, 415), ({**related([mr]), "headers": {"content-type": "multipart/related"}}, 400),
                             ({"headers": {"content-type": "multipart/related; boundary=b"}, "content": b"--b--"}, 400), ({"headers": {"content-type": "multipart/related; boundary=b"}, "content": related([mr])["content"][:500]}, 400)):
            answer = client.post("/dicom-web/studies", **more)
            assert answer.status_code == status and answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("uid", ["../../../../tmp/evil", "1.2.3/../../x", "1" * 80, "1..2", "", "1.2.3\\..", "%2e%2e"])
def test_uids_are_never_paths(service, uid):
    ds = pydicom.dcmread(get_testdata_file("MR_small.dcm"))
    with pydicom.config.disable_value_validation():
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = uid
        out = io.BytesIO()
        ds.save_as(out, enforce_file_format=False)
    before = {p for p in Path(service.settings.store).parent.rglob("*.dcm")}
    with service.client() as client:
        answer = client.post("/dicom-web/studies", **related([out.getvalue()]))
        assert answer.status_code == 409 and codes(answer) == ["0xc000"]
        assert 400 <= client.get(f"/dicom-web/studies/{uid or '..'}/metadata").status_code < 500
    assert {p for p in Path(service.settings.store).parent.rglob("*.dcm")} == before


def test_the_malformed_corpus_is_kept_or_refused(service, data_root):
    seen, kept = {}, []
    with service.client() as client:
        for path in sorted((data_root / "dicom_odd" / "fuzz").glob("*/*.dcm")):
            answer = client.post("/dicom-web/studies", **related([path.read_bytes()]))
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 202, 400, 409, 415), path.name
            assert answer.status_code not in (202, 409) or codes(answer), path.name
            kept += [i["00081190"]["Value"][0] for i in answer.json().get("00081199", {}).get("Value", [])]
        print(seen, len(kept))
        for url in kept:
            for more in ("/metadata", "/rendered", "/frames/1", ""):
                assert client.get(url + more).status_code in (200, 404, 415, 422), url + more
        assert sum(seen.values()) == 206 and service.alive(PNG)


def test_queries_are_exact_or_refused(service, stored):
    with service.client() as client:
        warned = client.get("/dicom-web/studies?PatientWeight=70")
        assert warned.status_code == 200 and "PatientWeight" in warned.headers["warning"]
        for query in ("PatientIdd=1", "limit=-1", "offset=x", "99999999=1", "'%20OR%201=1--=x"):
            assert client.get(f"/dicom-web/studies?{query}").status_code == 400, query
        assert client.get("/dicom-web/studies?PatientID=' OR '1'='1").status_code == 204 and client.get("/dicom-web/studies?PatientID=%25").status_code == 204
        assert client.get("/dicom-web/studies", headers={"accept": "application/dicom+xml"}).status_code == 406


def test_roles_and_audit(service, stored):
    ct = stored["CT_small.dcm"]
    with service.client(service.new_key("viewer")) as viewer:
        assert viewer.get("/dicom-web/studies").status_code == 200
        assert viewer.post("/dicom-web/studies", **related([b"x"])).status_code == 403
        assert viewer.get(f"/dicom-web/studies/{ct.StudyInstanceUID}/metadata").status_code == 200
    lines = [json.loads(line) for line in Path(service.settings.store, "audit.jsonl").read_text().splitlines()]
    seen = [line["e"] for line in lines if line["e"].get("actor") == "a-viewer"]
    assert {e["action"] for e in seen} == {"study:read", "study:store"} and any(e.get("study") for e in seen)
    assert ct.StudyInstanceUID not in json.dumps(lines)


def test_a_stored_study_is_answered_as_a_job(service, stored):
    ct = stored["CT_small.dcm"]
    with service.client() as client:
        receipt = client.post(f"/v1/jobs?study_uid={ct.StudyInstanceUID}")
        assert receipt.status_code == 202
        with client.stream("GET", receipt.headers["location"] + "/events") as stream:
            assert "event: done" in "".join(stream.iter_text())
        record = client.get(receipt.headers["location"]).json()["predictions"][0]
        assert record["status"] == "refused" and record["study"]["study_uid"] == ct.StudyInstanceUID
        assert client.get(f"/v1/results?study_uid={ct.StudyInstanceUID}").json()["results"][0]["study_uid"] == ct.StudyInstanceUID
        assert client.post("/v1/jobs?study_uid=1.2.3.9").status_code == 404
