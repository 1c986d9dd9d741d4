//! A command that tells of a migration until it is over, read line by line.

use super::PairError;
use super::answers::{MigrationState, MigrationView};
use super::command::{Refusal, bind_to_this_thread, reader};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the command may take to end once it has closed its output.
const END_WITHIN: Duration = Duration::from_secs(60);

/// What the command said, and when it was heard.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at: Instant,
    pub view: MigrationView,
}

/// How a followed migration ended.
#[derive(Clone, Debug)]
pub struct Ended {
    pub exit: Option<i32>,
    /// What the command said when it failed.
    pub refusal: Option<Refusal>,
    /// The last it told.
    pub last: Option<Seen>,
}

impl Ended {
    pub fn completed(&self) -> bool {
        let last = self.last.as_ref().map(|seen| seen.view.state);
        self.exit == Some(0) && last == Some(MigrationState::Completed)
    }

    /// One sentence about the end.
    pub fn describe(&self) -> String {
        match (&self.refusal, &self.last) {
            (Some(refusal), _) => refusal.to_string(),
            (None, Some(seen)) => format!("{:?} in {}", seen.view.state, seen.view.phase),
            (None, None) => format!("exit {:?} without a word", self.exit),
        }
    }
}

/// A running `migrate` or `watch`, to be started on a thread that lives as long. Dropping it ends the
/// command, not the migration.
#[derive(Debug)]
pub struct Follow {
    command: String,
    child: Child,
    lines: Receiver<(Instant, String)>,
    stderr: Option<JoinHandle<String>>,
    last: Option<Seen>,
}

impl Follow {
    pub(super) fn start(mut command: Command, shown: String) -> Result<Follow, PairError> {
        bind_to_this_thread(&mut command);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| PairError::Start {
                command: shown.clone(),
                source,
            })?;
        // Bounded by the command's pace, a few lines a second, and by its life.
        let (sender, lines) = channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send((Instant::now(), line)).is_err() {
                        break;
                    }
                }
            });
        }
        let stderr = child.stderr.take().map(reader);
        Ok(Follow {
            command: shown,
            child,
            lines,
            stderr,
            last: None,
        })
    }

    /// The next it tells; `Ok(None)` if it tells nothing within the time or has ended.
    pub fn next(&mut self, within: Duration) -> Result<Option<Seen>, PairError> {
        match self.lines.recv_timeout(within) {
            Ok((at, line)) => {
                let view = serde_json::from_str(&line).map_err(|source| PairError::Answer {
                    command: self.command.clone(),
                    answer: line,
                    source,
                })?;
                let seen = Seen { at, view };
                self.last = Some(seen.clone());
                Ok(Some(seen))
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Ok(None),
        }
    }

    /// Whether nothing more will come.
    pub fn is_over(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    /// Waits until `wanted` is told.
    pub fn until(
        &mut self,
        awaited: &'static str,
        within: Duration,
        wanted: impl Fn(&MigrationView) -> bool,
    ) -> Result<Seen, PairError> {
        let deadline = Instant::now() + within;
        loop {
            let over = self.is_over();
            match self.next(Duration::from_millis(100))? {
                Some(seen) if wanted(&seen.view) => return Ok(seen),
                Some(_) => {}
                None if over => {
                    let end = self.end(END_WITHIN)?.describe();
                    return Err(PairError::EndedEarly { awaited, end });
                }
                None => {}
            }
            if Instant::now() >= deadline {
                return Err(self.not_reached(awaited, within));
            }
        }
    }

    /// Waits for the command's end.
    pub fn end(&mut self, within: Duration) -> Result<Ended, PairError> {
        let deadline = Instant::now() + within;
        loop {
            let over = self.is_over();
            if self.next(Duration::from_millis(50))?.is_none() && over {
                break;
            }
            if Instant::now() >= deadline {
                return Err(self.not_reached("its end", within));
            }
        }
        let status = self.child.wait().map_err(|source| PairError::Start {
            command: self.command.clone(),
            source,
        })?;
        let stderr = self.stderr.take().and_then(|r| r.join().ok());
        let refusal = (!status.success())
            .then(|| Refusal::read(&self.command, status.code(), stderr.unwrap_or_default()));
        Ok(Ended {
            exit: status.code(),
            refusal,
            last: self.last.clone(),
        })
    }

    fn not_reached(&self, awaited: &'static str, after: Duration) -> PairError {
        let last = self.last.as_ref().map_or("nothing".to_owned(), |seen| {
            let view = &seen.view;
            let percent = f64::from(view.permille) / 10.0;
            format!(
                "{} {percent} % ({:?}) {:?}",
                view.phase, view.state, view.messages
            )
        });
        PairError::NotReached {
            awaited,
            after,
            last,
        }
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        // Both fail only for one that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
