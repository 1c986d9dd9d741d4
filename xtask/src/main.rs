//! The project's own commands: `cargo xtask setup`, `test`, `demo` and `bench`.
//!
//! Standard library only, so that the first command on a fresh clone is built within seconds; everything heavy
//! (cargo, apt, the laboratory) runs as a child process.

mod apt;
mod arrows;
mod artifacts;
mod dependencies;
mod error;
mod faults;
mod fuzz;
mod kernel;
mod layout;
mod manifest;
mod needs;
mod process;
mod qemu;
mod setup;
mod sources;
mod steps;
mod test;
mod tools;
mod workspace;

use std::process::ExitCode;

use error::Error;
use workspace::Workspace;

const USAGE: &str = "\
The project's own commands.

  cargo xtask setup                      find out what this machine lacks and install it, saying what and why
  cargo xtask test [OPTIONS] [FILTER]    everything that CI checks, in order; with FILTER only the tests whose
                                         name contains it
      --quick                            leave out licences, documentation, fuzzing and the tests that boot QEMU
      --only STEP[,STEP...]              these steps only
      --keep-going                       run the later steps although one failed
      --list                             name the steps and end
  cargo xtask sim --seed S               one run of the simulator, with all that happens in it
  cargo xtask sim --runs N [--from S]    many, on all cores, until one breaks a promise
  cargo xtask demo [ARGS...]             build the release binaries and show a machine being moved
  cargo xtask bench NAME [ARGS...]       build the release binaries and run one benchmark of the laboratory
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match dispatch(&args) {
        Ok(()) => ExitCode::SUCCESS,
        // The runner's own summary stays the last thing on the screen.
        Err(Error::TestsFailed) => ExitCode::FAILURE,
        Err(error @ Error::Usage(_)) => {
            eprintln!("xtask: {error}\n\n{USAGE}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(args: &[String]) -> Result<(), Error> {
    let workspace = Workspace::find();
    match args.split_first() {
        None => Err(Error::Usage("no command given".into())),
        Some((command, rest)) => match command.as_str() {
            "setup" if rest.is_empty() => setup::everything(&workspace),
            "setup" => Err(Error::Usage("setup takes no arguments".into())),
            "test" => test::run(&workspace, rest),
            "sim" => faults::simulate(&workspace, rest),
            "demo" | "bench" => artifacts::exec_lab(&workspace, args),
            "help" | "--help" | "-h" => {
                print!("{USAGE}");
                Ok(())
            }
            other => Err(Error::Usage(format!("no command is called {other:?}"))),
        },
    }
}
