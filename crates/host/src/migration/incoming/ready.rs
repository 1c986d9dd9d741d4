//! Making ready, while the guest still runs at the source: room for the volumes, a QEMU that waits, and a
//! place for its RAM once the source has told the layout.

use std::path::PathBuf;
use std::sync::Arc;

use whimbrel_engine::inflow::SpaceIn;
use whimbrel_engine::set::UnitSet;
use whimbrel_engine::switchover::DestinationEvent;
use whimbrel_peer::rights::Right;
use whimbrel_qemu::sink::{PostcopySink, PrecopySink, postcopy_possible};
use whimbrel_qemu::stream::{RamBlock, StreamLayout};
use whimbrel_wire::message::{Layout, Message, RamMode};

use super::Incoming;
use crate::disk::{Disk, Mode};
use crate::machine::{Boot, ram_in_socket, start};
use crate::machines::disk_of;
use crate::migration::arrivals::{RamIn, RamSink};
use crate::migration::landing::Plan;
use crate::migration::peeks::DiskPeek;
use crate::migration::record::save_layout;
use crate::migration::spaces;
use crate::service::peers::not_allowed;

/// Most RAM blocks a machine may have.
const MAX_BLOCKS: usize = 4096;

impl Incoming {
    pub(super) async fn make_ready(&mut self) {
        match self.try_make_ready().await {
            Ok(()) => self.event(DestinationEvent::Ready),
            Err(why) => {
                tracing::warn!(why, "cannot take the machine in");
                self.refusal = Some(why);
                self.event(DestinationEvent::Failed);
            }
        }
    }

    async fn try_make_ready(&mut self) -> Result<(), String> {
        let offer = self.offer.clone().ok_or("nothing was offered")?;
        let host = self.setup.host.clone();
        // Asked when it connected; the operator may have changed it since.
        let peer = self.setup.board.view().peer;
        if !host.trust.get(&peer).is_ok_and(|known| known.may.send) {
            return Err(not_allowed(&peer, Right::Send).to_string());
        }
        let probe = crate::machine::probe(&host.config)
            .await
            .map_err(|e| e.to_string())?;
        probe
            .concrete(&offer.machine_type)
            .map_err(|e| e.to_string())?;
        let plan = Plan::make(&host, &self.setup.migration, &offer).map_err(|e| e.to_string())?;
        let landing = match plan.clone().carry_out(&host, &self.setup.migration).await {
            Ok(landing) => landing,
            Err(error) => {
                plan.undo(&host).await;
                return Err(error.to_string());
            }
        };
        let disks = landing.volumes.iter().enumerate().map(|(n, volume)| {
            let peek = DiskPeek {
                space: spaces::disk_id(n),
                peeks: self.setup.peeks.clone(),
                mouth: self.setup.link.mouth.clone(),
            };
            let mode = Mode::Arriving(Arc::new(peek));
            disk_of(&host, &volume.record, volume.file.clone(), mode)
        });
        let disks: Vec<Arc<Disk>> = disks.collect();
        self.setup.arrivals.expect_disks(disks.len());
        self.find_seeds(landing.plan()).await;
        let spec = landing.plan().spec.clone();
        let folder = host.state.machine_folder(&spec.name);
        self.landing = Some(landing);
        let boot = Boot::Incoming {
            machine_type: &offer.machine_type,
        };
        let running = start(&host.config, &folder, &spec, disks, boot)
            .await
            .map_err(|e| e.to_string())?;
        self.ram_mode = match offer.ram {
            RamMode::Precopy => RamMode::Precopy,
            asked => match (postcopy_possible(&running.qmp).await, asked) {
                (Ok(()), _) => RamMode::Postcopy,
                (Err(error), RamMode::Postcopy) => {
                    self.running = Some(running);
                    let way = match error {
                        whimbrel_qemu::Error::PageSize { .. } => "ask for `--ram precopy`",
                        _ => {
                            "let the daemon run as root, set vm.unprivileged_userfaultfd=1, or ask for `--ram precopy`"
                        }
                    };
                    return Err(format!("{error}; {way}"));
                }
                (Err(error), _) => {
                    self.refusal = Some(format!("RAM goes by pre-copy: {error}"));
                    RamMode::Precopy
                }
            },
        };
        self.running = Some(running);
        Ok(())
    }

    pub(super) async fn take_layout(&mut self, layout: Layout) {
        if self.layout.is_some() {
            self.setup.link.mouth.say(Message::LayoutTaken).await;
            return;
        }
        match self.try_take_layout(layout).await {
            Ok(()) => self.setup.link.mouth.say(Message::LayoutTaken).await,
            Err(why) => {
                self.refusal = Some(why);
                self.event(DestinationEvent::Failed);
            }
        }
    }

    async fn try_take_layout(&mut self, layout: Layout) -> Result<(), String> {
        let running = self.running.as_ref().ok_or("a layout before the machine")?;
        if layout.blocks.len() > MAX_BLOCKS {
            return Err(format!("{} RAM blocks are too many", layout.blocks.len()));
        }
        let layout = StreamLayout {
            configuration: layout.configuration,
            ram_section: layout.ram_section,
            ram_instance: layout.ram_instance,
            blocks: layout
                .blocks
                .into_iter()
                .map(|b| RamBlock {
                    name: b.name,
                    len: b.len,
                    page_size: b.page_size,
                })
                .collect(),
        };
        let socket = self.ram_socket();
        let (sink, requests) = match self.ram_mode {
            RamMode::Precopy => {
                let sink = PrecopySink::start(&running.qmp, &socket, &layout)
                    .await
                    .map_err(|e| e.to_string())?;
                (RamSink::Precopy(sink), None)
            }
            RamMode::Postcopy | RamMode::Auto => {
                let (sink, requests) = PostcopySink::start(&running.qmp, &socket, &layout)
                    .await
                    .map_err(|e| e.to_string())?;
                (RamSink::Postcopy(sink), Some(requests))
            }
        };
        let wants = self.setup.wants.clone();
        let blocks = spaces::ram(running.disks.len(), &layout).map(SpaceIn::absent);
        let ram = Arc::new(RamIn::new(
            blocks.collect(),
            sink,
            wants,
            self.setup.board.clock(),
        ));
        self.setup.arrivals.set_ram(ram.clone());
        if let Some(requests) = requests {
            self.pass_requests(ram.clone(), requests);
        } else {
            self.setup.arrivals.open_ram();
        }
        save_layout(&self.folder(), &layout).map_err(|e| e.to_string())?;
        self.ram = Some(ram);
        let none = layout.blocks.iter().map(|b| UnitSet::empty(b.units()));
        self.stale = none.collect();
        self.layout = Some(layout);
        Ok(())
    }

    pub(super) fn ram_socket(&self) -> PathBuf {
        let landing = self.landing.as_ref();
        let landing = landing.expect("memory is taken only after making ready");
        let state = &self.setup.host.state;
        ram_in_socket(&state.machine_folder(&landing.plan().spec.name))
    }
}
