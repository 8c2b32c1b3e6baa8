//! Questions and orders to the kernel's IPVS.

use ferrule_model::address::BackendAddr;
use ferrule_model::service::ServiceKey;
use ferrule_netlink::{Error, Protocol, RawMessage, Socket, generic};
use netlink_packet_core::DefaultNla;

use super::server::{RealServer, ServerSettings};
use super::service::{Service, ServiceSettings, emit_key};
use super::timeouts::{Info, Timeouts};

/// Name and version of the generic netlink family.
const FAMILY: &str = "IPVS";
const VERSION: u8 = 1;

/// `IPVS_CMD_*`.
mod command {
    pub(super) const NEW_SERVICE: u8 = 1;
    pub(super) const SET_SERVICE: u8 = 2;
    pub(super) const DELETE_SERVICE: u8 = 3;
    pub(super) const GET_SERVICE: u8 = 4;
    pub(super) const NEW_SERVER: u8 = 5;
    pub(super) const SET_SERVER: u8 = 6;
    pub(super) const DELETE_SERVER: u8 = 7;
    pub(super) const GET_SERVER: u8 = 8;
    pub(super) const SET_CONFIG: u8 = 12;
    pub(super) const GET_CONFIG: u8 = 13;
    pub(super) const GET_INFO: u8 = 15;
    pub(super) const ZERO: u8 = 16;
    pub(super) const FLUSH: u8 = 17;
}

/// Something that the kernel is told to do.
///
/// Refusals: to add what exists is [`Error::already_exists`]; to change or
/// remove what does not exist is [`Error::is_not_found`], and so is a scheduler
/// that the kernel neither has nor can load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Make a virtual service.
    AddService(ServiceKey, ServiceSettings),
    /// Change a virtual service; its connections live on.
    SetService(ServiceKey, ServiceSettings),
    /// Remove a virtual service with its real servers.
    DeleteService(ServiceKey),
    /// Add a real server.
    AddServer(ServiceKey, BackendAddr, ServerSettings),
    /// Change a real server.
    SetServer(ServiceKey, BackendAddr, ServerSettings),
    /// Remove a real server.
    DeleteServer(ServiceKey, BackendAddr),
    /// Set a service's counters to zero.
    Zero(ServiceKey),
}

/// A connection to the IPVS of one network namespace.
#[derive(Debug)]
pub struct Client {
    socket: Socket,
    family: u16,
}

impl Client {
    /// Connects to the IPVS of the calling thread's network namespace. The
    /// kernel loads the module where it may.
    ///
    /// # Errors
    /// [`Error::is_not_found`] when the kernel has no IPVS.
    pub async fn open() -> Result<Self, Error> {
        let socket = Socket::open(Protocol::Generic)?;
        let family = generic::family(&socket, FAMILY).await?;
        Ok(Self { socket, family })
    }

    fn message(&self, command: u8, attributes: &[DefaultNla]) -> RawMessage {
        generic::command(self.family, command, VERSION, attributes)
    }

    /// Every virtual service of the namespace, foreign ones included, save those
    /// of a protocol that IPVS does not balance, which do nothing.
    ///
    /// # Errors
    /// [`Error`]; what is returned is complete.
    pub async fn services(&self) -> Result<Vec<Service>, Error> {
        let question = self.message(command::GET_SERVICE, &[]);
        let mut services = Vec::new();
        for answer in self.socket.dump(question).await? {
            services.extend(Service::parse(generic::parts(&answer)?.1)?);
        }
        Ok(services)
    }

    /// One virtual service; `None` if there is no such service.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn service(&self, key: &ServiceKey) -> Result<Option<Service>, Error> {
        let question = self.message(command::GET_SERVICE, &[emit_key(key)]);
        let answers = match self.socket.request(question, 0).await {
            Ok(answers) => answers,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        match answers.first() {
            Some(answer) => Service::parse(generic::parts(answer)?.1),
            None => Ok(None),
        }
    }

    /// The real servers of a virtual service.
    ///
    /// # Errors
    /// [`Error`]; what is returned is complete. A service that does not exist
    /// has no servers, for that is how the kernel answers.
    pub async fn servers(&self, service: &ServiceKey) -> Result<Vec<RealServer>, Error> {
        let question = self.message(command::GET_SERVER, &[emit_key(service)]);
        let mut servers = Vec::new();
        for answer in self.socket.dump(question).await? {
            let attributes = generic::parts(&answer)?.1;
            servers.extend(RealServer::parse(attributes, service.family())?);
        }
        Ok(servers)
    }

    /// Carries orders out; the i-th result is that of the i-th order.
    pub async fn carry_out(&self, orders: &[Order]) -> Vec<Result<(), Error>> {
        let messages = orders.iter().map(|order| (self.order(order), 0)).collect();
        self.socket.batch(messages).await
    }

    fn order(&self, order: &Order) -> RawMessage {
        let (command, attributes) = match order {
            Order::AddService(key, settings) => {
                (command::NEW_SERVICE, vec![Service::emit(key, settings)])
            }
            Order::SetService(key, settings) => {
                (command::SET_SERVICE, vec![Service::emit(key, settings)])
            }
            Order::DeleteService(key) => (command::DELETE_SERVICE, vec![emit_key(key)]),
            Order::AddServer(key, addr, settings) => (
                command::NEW_SERVER,
                vec![emit_key(key), RealServer::emit(addr, settings)],
            ),
            Order::SetServer(key, addr, settings) => (
                command::SET_SERVER,
                vec![emit_key(key), RealServer::emit(addr, settings)],
            ),
            Order::DeleteServer(key, addr) => (
                command::DELETE_SERVER,
                vec![emit_key(key), RealServer::emit_key(addr)],
            ),
            Order::Zero(key) => (command::ZERO, vec![emit_key(key)]),
        };
        self.message(command, &attributes)
    }

    /// The namespace's time-outs.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn timeouts(&self) -> Result<Timeouts, Error> {
        let question = self.message(command::GET_CONFIG, &[]);
        Timeouts::parse(&one(self.socket.request(question, 0).await?)?)
    }

    /// Sets the namespace's time-outs; zero leaves one as it is.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn set_timeouts(&self, timeouts: &Timeouts) -> Result<(), Error> {
        let order = self.message(command::SET_CONFIG, &timeouts.emit());
        self.socket.request(order, 0).await.map(drop)
    }

    /// Version of IPVS and size of its connection table.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn info(&self) -> Result<Info, Error> {
        let question = self.message(command::GET_INFO, &[]);
        Info::parse(&one(self.socket.request(question, 0).await?)?)
    }

    /// Removes every virtual service of the namespace, foreign ones included.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn flush(&self) -> Result<(), Error> {
        let order = self.message(command::FLUSH, &[]);
        self.socket.request(order, 0).await.map(drop)
    }
}

/// The attributes of the single message of an answer.
fn one(answers: Vec<RawMessage>) -> Result<Vec<u8>, Error> {
    let answer = answers
        .into_iter()
        .next()
        .ok_or_else(|| Error::Decode("the answer is empty".to_owned()))?;
    Ok(generic::parts(&answer)?.1.to_vec())
}
