use super::*;
use crate::api::fake::sample_report;
use crate::api::types::{Event, ReportView};
use crate::report::svg;

/// Panics unless the text is well-formed XML, as far as what is written here goes: elements that nest, quoted
/// attributes, no stray `<` or `&`, no characters that XML does not know.
pub(crate) fn well_formed(text: &str) {
    let allowed = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    assert!(text.chars().all(allowed), "a character that may not be");
    let mut open: Vec<&str> = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('<') {
        references(&rest[..at]);
        rest = &rest[at + 1..];
        let end = rest.find('>').expect("a tag ends");
        let tag = &rest[..end];
        rest = &rest[end + 1..];
        if tag.starts_with('!') {
            continue;
        }
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closes what is open");
            continue;
        }
        let name = tag.split([' ', '/']).next().expect("a name");
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric()), "{tag}");
        let attributes = &tag[name.len()..];
        assert_eq!(attributes.matches('"').count() % 2, 0, "{tag}");
        for (n, part) in attributes.split('"').enumerate() {
            match n % 2 {
                0 => assert!(
                    part.trim().is_empty() || part.trim() == "/" || part.trim().ends_with('='),
                    "{tag}"
                ),
                _ => references(part),
            }
        }
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    references(rest);
    assert_eq!(open, Vec::<&str>::new());
}

fn references(text: &str) {
    for (at, _) in text.match_indices('&') {
        let name = &text[at + 1..];
        let name = &name[..name.find(';').expect("a reference ends")];
        assert!(
            ["amp", "lt", "gt", "quot", "#39"].contains(&name),
            "&{name};"
        );
    }
}

fn hostile() -> ReportView {
    const HOSTILE: &str = "<script>alert('\"&\u{1b}')</script>";
    let mut report = sample_report();
    report.host = HOSTILE.to_string();
    report.elsewhere.push(HOSTILE.to_string());
    for space in &mut report.timeline.spaces {
        space.name = HOSTILE.to_string();
    }
    for space in &mut report.migration.spaces {
        space.name = HOSTILE.to_string();
    }
    report.timeline.events.push(Event {
        at_ms: 1,
        what: Happened::Told(HOSTILE.to_string()),
    });
    report.migration.error = Some(crate::api::ApiError::new(
        crate::api::ErrorCode::Io,
        HOSTILE,
    ));
    report.summary.blackout_parts[0].name = HOSTILE.to_string();
    report
}

#[test]
fn page_and_plots_are_well_formed() {
    well_formed(&html(&sample_report()));
    well_formed(&svg(&sample_report()));
}

#[test]
fn what_others_call_things_is_text() {
    for text in [html(&hostile()), svg(&hostile())] {
        well_formed(&text);
        assert!(!text.contains("<script"), "{text}");
        assert!(text.contains("&lt;script&gt;"));
    }
}

#[test]
fn the_page_needs_nothing_else() {
    let text = html(&sample_report());
    let without = text.replace("http://www.w3.org/", "");
    for word in [
        "http:", "https:", "src=", "url(", "@import", "<link", "<script",
    ] {
        assert!(!without.contains(word), "{word}");
    }
}

#[test]
fn everything_that_is_known_is_drawn() {
    let text = html(&sample_report());
    for part in [
        "web1 from a to b",
        "72 ms",
        "blackout: stop to grant",
        "one outage",
        "Sent, by class",
        "around the switch",
        "What held push back",
        "requests to its disks took",
        "How long demands took",
        "At the destination",
        "pc.ram",
        "link is back after 3.0 s",
        "only b knows",
    ] {
        assert!(text.contains(part), "{part}");
    }
}

#[test]
fn a_migration_that_has_just_begun_has_a_page() {
    let mut report = sample_report();
    report.timeline.stretches.clear();
    report.timeline.events.clear();
    report.timeline.spaces.clear();
    report.migration.spaces.clear();
    report.summary = crate::report::summary(&report.migration, &report.timeline);
    well_formed(&html(&report));
}

/// For eyes: `WHIMBREL_REPORT_SAMPLE=/tmp/x cargo test -p whimbrel-host --lib a_sample_to_look_at`.
#[test]
fn a_sample_to_look_at() {
    let Some(folder) = std::env::var_os("WHIMBREL_REPORT_SAMPLE") else {
        return;
    };
    let folder = std::path::PathBuf::from(folder);
    std::fs::write(folder.join("report.html"), html(&sample_report())).expect("written");
    std::fs::write(folder.join("report.svg"), svg(&sample_report())).expect("written");
}
