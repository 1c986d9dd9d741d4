//! `whimbrel report` against a daemon made of memory.

use super::{code, daemon, err, out, whimbrel};
use serde_json::Value;
use whimbrel_host::api::fake::FakeService;

#[test]
fn a_report_is_a_screen_a_page_and_plots() {
    let d = daemon(FakeService::new());
    let state = d.dir.path();
    let shown = whimbrel(state, "report web1");
    assert_eq!(code(&shown), 0, "{}", err(&shown));
    assert!(out(&shown).contains("blackout:"), "{}", out(&shown));
    let (page, plots) = (state.join("r.html"), state.join("r.svg"));
    let line = format!(
        "report m-1 --html {} --svg {}",
        page.display(),
        plots.display()
    );
    let written = whimbrel(state, &line);
    assert_eq!(code(&written), 0, "{}", err(&written));
    assert!(out(&written).contains("r.html and "), "{}", out(&written));
    let read = |path| std::fs::read_to_string(path).unwrap();
    assert!(read(&page).contains("web1 from a to b") && read(&plots).starts_with("<svg"));
    let told: Value = serde_json::from_str(&out(&whimbrel(state, "report --json"))).unwrap();
    assert_eq!(told["summary"]["blackout_ms"], 72.0);
    assert_eq!(told["timeline"]["stretches"].as_array().unwrap().len(), 120);
}

#[test]
fn what_is_not_known_is_answered_with_what_is() {
    let d = daemon(FakeService::new());
    let refused = whimbrel(d.dir.path(), "report mail");
    assert_eq!(code(&refused), 1);
    for part in ["`mail`", "m-1 (web1 to b"] {
        assert!(err(&refused).contains(part), "{}", err(&refused));
    }
    assert!(out(&whimbrel(d.dir.path(), "report --list")).contains("web1"));
    let unwritable = whimbrel(d.dir.path(), "report --html /nonexistent/x.html");
    assert_eq!(code(&unwritable), 1);
    assert!(err(&unwritable).contains("/nonexistent/x.html"));
}
