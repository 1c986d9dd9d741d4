//! `whimbrel report`.

use clap::Args;
use std::path::PathBuf;

/// Which migration, and in which form.
#[derive(Debug, Args)]
pub struct Report {
    /// The migration's id, or the beginning of it; or the machine, for its newest migration [default: the newest]
    pub migration: Option<String>,
    /// Write a page with all figures and plots to a file; it needs no network and no scripts
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write the plots alone to a file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// List the migrations that there are reports of
    #[arg(long, conflicts_with_all = ["migration", "html", "svg"])]
    pub list: bool,
}

#[cfg(test)]
mod tests {
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("whimbrel").chain(line.split_whitespace()))
    }

    #[test]
    fn a_report_goes_to_the_terminal_or_to_files() {
        for line in [
            "report",
            "report web1",
            "report 0a1b",
            "report --list",
            "report --json",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
        let Command::Report(report) = parse("report web1 --html /h --svg /s").unwrap().command
        else {
            panic!()
        };
        assert_eq!(report.migration.as_deref(), Some("web1"));
        assert!(report.html.is_some() && report.svg.is_some());
        assert!(parse("report web1 --list").is_err());
    }
}
