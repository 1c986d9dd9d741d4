//! `whimbrel fsck`: a state directory, explained without a daemon.

use crate::context::Context;
use crate::error::CliError;
use std::path::PathBuf;
use whimbrel_host::api::FindingKind;
use whimbrel_host::fsck::{Explanation, explain};

pub async fn fsck(context: &Context, dir: Option<PathBuf>) -> Result<(), CliError> {
    let root = dir.unwrap_or_else(|| context.config.state.clone());
    let explained = explain(&root).await?;
    context.answer(&explained, text);
    if explained.verdict == FindingKind::Broken {
        return Err(CliError::StateBroken { root });
    }
    Ok(())
}

fn text(explained: &Explanation) -> String {
    let mut text = format!("{}\n", explained.root.display());
    for item in &explained.items {
        text.push_str(&format!("\n{}\n", item.what));
        for finding in &item.findings {
            let mark = match finding.kind {
                FindingKind::Good => "  ",
                FindingKind::Repaired | FindingKind::Untidy => "- ",
                FindingKind::Broken => "! ",
            };
            text.push_str(&format!("  {mark}{}\n", finding.what));
            if let Some(next) = &finding.next_step {
                text.push_str(&format!("      next: {next}\n"));
            }
        }
    }
    text.push_str(match explained.verdict {
        FindingKind::Good | FindingKind::Repaired => "\nnothing is wrong",
        FindingKind::Untidy => "\nnothing is broken",
        FindingKind::Broken => "\nsomething is broken: the lines with `!`",
    });
    text
}
