//! Traces are made and shown without a daemon.

use super::{err, out, whimbrel};
use serde_json::Value;

const IOLOG: &str = "\
fio version 3 iolog
0 /dev/vda add
0 /dev/vda read 1048576 4096
500000 /dev/vda write 0 8192
61000000 /dev/vda read 1048576 4096
";

#[test]
fn a_record_is_imported_and_shown_with_its_picture() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("log"), IOLOG).unwrap();
    let import = format!("trace import {} {}", path("log"), path("trace"));
    let said = whimbrel(dir.path(), &import);
    assert!(
        out(&said).contains("3 reads and writes from fio-iolog"),
        "{}",
        err(&said)
    );
    // It is not replaced.
    assert_eq!(whimbrel(dir.path(), &import).status.code(), Some(1));
    let show = format!("trace show {} --json --svg {}", path("trace"), path("svg"));
    let shown: Value = serde_json::from_str(&out(&whimbrel(dir.path(), &show))).unwrap();
    assert_eq!(shown["reads"]["requests"], 2);
    assert_eq!(shown["windows"][1]["read_set"], 65_536);
    assert!(
        std::fs::read_to_string(path("svg"))
            .unwrap()
            .contains("<polyline")
    );
    let same = whimbrel(dir.path(), &format!("trace show {}", path("log")));
    assert!(out(&same).contains("windows of 60.0 s"), "{}", err(&same));
}

#[test]
fn a_wrong_line_is_named_and_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("log"), IOLOG.replace("write 0 8192", "wrote 0 8192")).unwrap();
    let said = whimbrel(
        dir.path(),
        &format!("trace import {} {}", path("log"), path("trace")),
    );
    assert_eq!(said.status.code(), Some(1));
    assert!(
        err(&said).contains("line 4: expected add, open"),
        "{}",
        err(&said)
    );
    assert!(!dir.path().join("trace").exists());
}
