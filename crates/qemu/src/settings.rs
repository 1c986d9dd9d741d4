//! A QEMU's migration settings: set for a hand-over, put back afterwards.
//!
//! QEMU keeps capabilities and parameters from one migration to the next, and an operator may have
//! set them for reasons of his own, so what Whimbrel changes it remembers.

use serde_json::{Map, Value, json};

use crate::Result;
use crate::qmp::Qmp;

/// Capabilities that change the stream, the guest or what is left of the source; all are switched off
/// but for the ones asked for. (`release-ram` would throw the way back away page by page.)
const OFF: [&str; 13] = [
    "xbzrle",
    "compress",
    "multifd",
    "release-ram",
    "block",
    "dirty-bitmaps",
    "auto-converge",
    "rdma-pin-all",
    "background-snapshot",
    "postcopy-preempt",
    "x-ignore-shared",
    "mapped-ram",
    "pause-before-switchover",
];

/// What was changed, with the values from before.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    capabilities: Vec<(String, bool)>,
    /// Capabilities that are on now, switched on here or found so: a daemon that died in a hand-over
    /// left them on.
    on: Vec<String>,
    parameters: Map<String, Value>,
}

impl Settings {
    /// Switches the capabilities in `on` on (those this QEMU has), the disturbing ones off, and sets
    /// the parameters.
    pub(crate) async fn change(
        qmp: &Qmp,
        on: &[&str],
        parameters: &[(&str, u64)],
    ) -> Result<Settings> {
        let known = qmp.execute("query-migrate-capabilities", json!({})).await?;
        let mut before = Vec::new();
        let mut change = Vec::new();
        let mut on_now = Vec::new();
        for entry in known.as_array().into_iter().flatten() {
            let (Some(name), Some(state)) =
                (entry["capability"].as_str(), entry["state"].as_bool())
            else {
                continue;
            };
            let wanted = on.contains(&name) || (state && !OFF.contains(&name));
            if wanted {
                on_now.push(name.to_owned());
            }
            if wanted != state {
                before.push((name.to_owned(), state));
                change.push(json!({"capability": name, "state": wanted}));
            }
        }
        let current = qmp.execute("query-migrate-parameters", json!({})).await?;
        let mut settings = Settings {
            capabilities: Vec::new(),
            on: on_now,
            parameters: Map::new(),
        };
        if !change.is_empty() {
            qmp.execute(
                "migrate-set-capabilities",
                json!({ "capabilities": change }),
            )
            .await?;
            settings.capabilities = before;
        }
        let mut change = Map::new();
        for (name, value) in parameters {
            if let Some(old) = current.get(*name) {
                settings.parameters.insert((*name).to_owned(), old.clone());
                change.insert((*name).to_owned(), json!(value));
            }
        }
        if let Err(error) = qmp
            .execute("migrate-set-parameters", Value::Object(change))
            .await
        {
            settings.parameters.clear();
            settings.restore(qmp).await?;
            return Err(error);
        }
        Ok(settings)
    }

    /// Settings of which nobody knows any more what they were: whoever changed them has died. Putting
    /// them back switches these capabilities off, as every QEMU has them at its start.
    pub(crate) fn forgotten(capabilities: &[&str]) -> Settings {
        Settings {
            capabilities: capabilities
                .iter()
                .map(|name| ((*name).to_owned(), false))
                .collect(),
            on: capabilities.iter().map(|name| (*name).to_owned()).collect(),
            parameters: Map::new(),
        }
    }

    /// Puts everything back. Only possible while no migration runs.
    pub(crate) async fn restore(&self, qmp: &Qmp) -> Result<()> {
        if !self.parameters.is_empty() {
            qmp.execute(
                "migrate-set-parameters",
                Value::Object(self.parameters.clone()),
            )
            .await?;
        }
        if !self.capabilities.is_empty() {
            let back: Vec<Value> = self
                .capabilities
                .iter()
                .map(|(name, state)| json!({"capability": name, "state": state}))
                .collect();
            qmp.execute("migrate-set-capabilities", json!({ "capabilities": back }))
                .await?;
        }
        Ok(())
    }

    /// Whether the capability is on while these settings hold.
    pub(crate) fn is_on(&self, capability: &str) -> bool {
        self.on.iter().any(|name| name == capability)
    }
}
