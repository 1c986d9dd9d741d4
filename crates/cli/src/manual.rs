//! Completions and manual pages, made from the command line's own definition.

use crate::args::Cli;
use crate::error::CliError;
use crate::output;
use clap::CommandFactory;
use clap_complete::Shell;
use std::path::Path;

pub fn completions(shell: Shell) {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "whimbrel", &mut text);
    output::print(String::from_utf8_lossy(&text).trim_end());
}

/// One page a command, `whimbrel-volume-create.1` and so on.
pub fn pages(dir: &Path) -> Result<(), CliError> {
    let failed = |action| {
        move |source| CliError::File {
            action,
            path: dir.to_path_buf(),
            source,
        }
    };
    std::fs::create_dir_all(dir).map_err(failed("make"))?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(failed("write the manual pages into"))
}
