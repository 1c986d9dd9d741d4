//! `bench guests`: machines as people have them, each moved for real, there and back, and verified.
//!
//! A case is a machine and what happens to it meanwhile. What this computer cannot carry is not left out
//! silently: it has a row with the reason.

mod cases;
mod memory;
mod play;

use crate::link::LinkArgs;
use crate::screen::Screen;
use cases::Case;
use clap::Args;
use play::Row;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub struct GuestsArgs {
    /// Only cases whose names contain one of these words
    #[arg(long, value_name = "WORD,...", value_delimiter = ',')]
    only: Vec<String>,
    /// Name the cases and what they are, and do nothing
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    link: LinkArgs,
    /// Write all rows into this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

impl GuestsArgs {
    fn wants(&self, case: &Case) -> bool {
        self.only.is_empty()
            || self
                .only
                .iter()
                .any(|word| case.name.contains(word.as_str()))
    }
}

pub fn run(args: &GuestsArgs) -> ExitCode {
    let mut screen = Screen::new();
    let cases: Vec<Case> = cases::all().into_iter().filter(|c| args.wants(c)).collect();
    if args.list {
        for case in &cases {
            screen.put(&format!("{:22} {}", case.name, case.what));
        }
        return ExitCode::SUCCESS;
    }
    screen.put(&format!(
        "{} machines, each moved there and back over {}; about a minute each",
        cases.len(),
        args.link.describe()
    ));
    screen.put(play::HEAD);
    let mut rows: Vec<Row> = Vec::new();
    for case in &cases {
        let played = play::play(case, &args.link, &mut screen);
        for row in &played {
            screen.put(&row.text());
        }
        rows.extend(played);
    }
    let wrong = rows.iter().filter(|row| row.is_wrong()).count();
    let skipped = rows.iter().filter(|row| row.skipped.is_some()).count();
    screen.put(&format!(
        "{} rows, {wrong} wrong, {skipped} that cannot run here",
        rows.len()
    ));
    super::ended(&mut screen, &args.json, &rows, wrong == 0)
}
