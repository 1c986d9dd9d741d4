//! What every command goes by: configuration, places, and how to answer.

use crate::args::Global;
use crate::client::Client;
use crate::error::CliError;
use crate::output;
use serde::Serialize;
use whimbrel_host::api::Listed;
use whimbrel_host::config::Config;
use whimbrel_host::state::StateDir;

pub struct Context {
    pub config: Config,
    pub client: Client,
    pub json: bool,
}

impl Context {
    /// Reads the configuration; the command line goes before it.
    pub fn new(global: Global) -> Result<Context, CliError> {
        let mut config = Config::load(global.config.as_deref())?;
        if let Some(state) = global.state {
            config.state = state;
        }
        if global.socket.is_some() {
            config.socket = global.socket;
        }
        let client = Client::new(config.socket_path());
        Ok(Context {
            config,
            client,
            json: global.json,
        })
    }

    /// The state directory, for what works without a daemon.
    pub fn state(&self) -> Result<StateDir, CliError> {
        Ok(StateDir::open(&self.config.state)?)
    }

    /// Answers with a view.
    pub fn answer<T: Serialize>(&self, view: &T, text: impl FnOnce(&T) -> String) {
        if self.json {
            output::print_json(view);
        } else {
            output::print(&text(view));
        }
    }

    /// Answers with a list; what is damaged goes beside it.
    pub fn answer_list<T: Serialize>(&self, list: &Listed<T>, text: impl FnOnce(&[T]) -> String) {
        if self.json {
            output::print_json(list);
            return;
        }
        output::print(&text(&list.items));
        for error in &list.damaged {
            output::print_error(&error.clone().into(), false);
        }
    }

    /// Answers that something was done.
    pub fn done(&self, what: &str) {
        if self.json {
            output::print_json(&serde_json::json!({ "done": what }));
        } else {
            output::print(what);
        }
    }
}
