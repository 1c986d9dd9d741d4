//! What can go wrong here, with what the reader needs to act on it.

use std::fmt;
use std::io;
use std::path::PathBuf;

#[derive(Debug)]
pub enum Error {
    /// The command line makes no sense; the usage is printed after it.
    Usage(String),
    /// A child process could not be started.
    Start { command: String, cause: io::Error },
    /// A child process ended with an error; it said why itself.
    Child { command: String, status: String },
    /// A file or folder could not be read or written.
    File { path: PathBuf, cause: io::Error },
    /// Something is missing and this program may not or cannot install it.
    ByHand {
        why: String,
        packages: Vec<&'static str>,
    },
    /// The guests' kernel is missing and could not be fetched.
    Kernel { why: String },
    /// cargo-deny is missing and could not be built.
    CargoDeny { cause: Box<Error> },
    /// A check of this crate's own found these faults.
    Check {
        what: &'static str,
        faults: Vec<String>,
    },
    /// Steps of `test` failed.
    Steps(Vec<&'static str>),
    /// The test runner reported failures; its summary says which.
    TestsFailed,
}

impl std::error::Error for Error {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Usage(what) => f.write_str(what),
            Error::Start { command, cause } => write!(f, "cannot start `{command}`: {cause}"),
            Error::Child { command, status } => write!(f, "`{command}` failed ({status})"),
            Error::File { path, cause } => write!(f, "{}: {cause}", path.display()),
            Error::ByHand { why, packages } => write!(
                f,
                "{why}\nPlease install these by hand, then run `cargo xtask setup` again (names of Debian packages):\n\
                 \n    apt-get install --no-install-recommends {}\n",
                packages.join(" ")
            ),
            Error::Kernel { why } => write!(
                f,
                "{why}\nThe guests need a kernel: install Debian's linux-image-cloud-amd64, or set WHIMBREL_KERNEL to an image \
                 X/boot/vmlinuz-VERSION whose modules are in X/lib/modules/VERSION."
            ),
            Error::CargoDeny { cause } => write!(
                f,
                "{cause}\ncargo-deny checks the licences of all dependencies. Install it by hand with \
                 `cargo install --locked cargo-deny`, or run the other steps alone: `cargo xtask test --list` names them."
            ),
            Error::Check { what, faults } => {
                write!(f, "{what}:")?;
                faults.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
            }
            Error::Steps(steps) => write!(
                f,
                "failed: {} (again, alone: cargo xtask test --only {})",
                steps.join(", "),
                steps.join(",")
            ),
            Error::TestsFailed => f.write_str("tests failed"),
        }
    }
}
