//! `whimbrel machine ...`

use crate::args::MachineCommand;
use crate::context::Context;
use crate::error::CliError;
use crate::show;
use crate::volume::whole_path;
use whimbrel_host::api::{AdoptRequest, Listed, MachineView, StopRequest};
use whimbrel_host::state::MachineSpec;

pub async fn machine(context: &Context, command: MachineCommand) -> Result<(), CliError> {
    let client = &context.client;
    let view: MachineView = match command {
        MachineCommand::Define { file } => {
            client
                .post("/v1/machines", &MachineSpec::read(&file)?)
                .await?
        }
        MachineCommand::Start { name } => {
            client.order(&format!("/v1/machines/{name}/start")).await?
        }
        MachineCommand::Stop { name, force } => {
            client
                .post(&format!("/v1/machines/{name}/stop"), &StopRequest { force })
                .await?
        }
        MachineCommand::Resume { name } => {
            client.order(&format!("/v1/machines/{name}/resume")).await?
        }
        MachineCommand::Adopt { file, qmp } => {
            let request = AdoptRequest {
                spec: MachineSpec::read(&file)?,
                qmp: whole_path(&qmp)?,
            };
            client.post("/v1/adoptions", &request).await?
        }
        MachineCommand::Show { name } => client.get(&format!("/v1/machines/{name}")).await?,
        MachineCommand::Ls => {
            let list: Listed<MachineView> = client.get("/v1/machines").await?;
            context.answer_list(&list, show::machines);
            return Ok(());
        }
        MachineCommand::Undefine { name } => {
            client.delete(&format!("/v1/machines/{name}")).await?;
            context.done(&format!("machine {name} is forgotten; its volumes stay"));
            return Ok(());
        }
    };
    context.answer(&view, show::machine);
    Ok(())
}
