//! The `CNI_*` variables. All of them are untrusted; what leaves this module
//! is checked.

use std::ffi::OsString;
use std::path::PathBuf;

use ferrule_api::PodName;
use ferrule_model::names::{Attachment, ContainerId, IfName, NameError};

use crate::failure::{Code, Failure};

/// Longest name of a pod, a DNS subdomain, and of a namespace, a DNS label (RFC 1123).
const MAX_POD_NAME: usize = 253;
const MAX_NAMESPACE: usize = 63;

/// What the runtime wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Make a pod's interface.
    Add,
    /// Remove it.
    Del,
    /// Compare it with what ADD reported.
    Check,
    /// Say whether ADD would work.
    Status,
    /// Remove what is not in use any longer.
    Gc,
    /// Report versions.
    Version,
}

/// Why the environment does not make a call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EnvironmentError {
    #[error("CNI_COMMAND is {0:?}: it must be ADD, DEL, CHECK, STATUS, GC or VERSION")]
    UnknownCommand(String),
    #[error("{0} is not set: the container runtime has to set it")]
    Missing(&'static str),
    #[error("{0} is not UTF-8")]
    NotUtf8(&'static str),
    #[error("{variable}: {source}")]
    Name {
        variable: &'static str,
        source: NameError,
    },
    #[error("CNI_NETNS is {0:?}: it must be the absolute path of a network namespace")]
    Netns(String),
    #[error("CNI_ARGS: {key} is {value:?}, which is no name of a Kubernetes object")]
    PodName { key: &'static str, value: String },
}

impl From<EnvironmentError> for Failure {
    fn from(error: EnvironmentError) -> Self {
        Self::new(Code::InvalidEnvironment, error.to_string())
    }
}

/// The variables, from wherever they come.
pub(crate) struct Environment<L>(pub(crate) L);

impl<L: Fn(&'static str) -> Option<OsString>> Environment<L> {
    /// A variable that is set and not empty.
    fn text(&self, variable: &'static str) -> Result<Option<String>, EnvironmentError> {
        match (self.0)(variable) {
            None => Ok(None),
            Some(value) if value.is_empty() => Ok(None),
            Some(value) => value
                .into_string()
                .map(Some)
                .map_err(|_| EnvironmentError::NotUtf8(variable)),
        }
    }

    fn required(&self, variable: &'static str) -> Result<String, EnvironmentError> {
        self.text(variable)?
            .ok_or(EnvironmentError::Missing(variable))
    }

    /// The verb; none when a person has started us.
    pub(crate) fn command(&self) -> Result<Option<Command>, EnvironmentError> {
        match self.text("CNI_COMMAND")?.as_deref() {
            None => Ok(None),
            Some("ADD") => Ok(Some(Command::Add)),
            Some("DEL") => Ok(Some(Command::Del)),
            Some("CHECK") => Ok(Some(Command::Check)),
            Some("STATUS") => Ok(Some(Command::Status)),
            Some("GC") => Ok(Some(Command::Gc)),
            Some("VERSION") => Ok(Some(Command::Version)),
            Some(other) => Err(EnvironmentError::UnknownCommand(shortened(other))),
        }
    }

    /// The interface that the call is about.
    pub(crate) fn attachment(&self) -> Result<Attachment, EnvironmentError> {
        let name = |variable| move |source| EnvironmentError::Name { variable, source };
        Ok(Attachment {
            container_id: ContainerId::try_from(self.required("CNI_CONTAINERID")?)
                .map_err(name("CNI_CONTAINERID"))?,
            interface: IfName::try_from(self.required("CNI_IFNAME")?)
                .map_err(name("CNI_IFNAME"))?,
        })
    }

    /// The pod's network namespace, for the verbs that need one.
    pub(crate) fn netns(&self) -> Result<PathBuf, EnvironmentError> {
        let text = self.required("CNI_NETNS")?;
        let path = PathBuf::from(&text);
        if path.is_absolute() && !text.contains('\0') {
            Ok(path)
        } else {
            Err(EnvironmentError::Netns(shortened(&text)))
        }
    }

    /// A value from `CNI_ARGS` that is not empty. Keys that we do not know are let pass,
    /// whatever `IgnoreUnknown` says.
    pub(crate) fn argument(&self, key: &str) -> Result<Option<String>, EnvironmentError> {
        let arguments = self.text("CNI_ARGS")?.unwrap_or_default();
        let found = arguments
            .split(';')
            .filter_map(|pair| pair.split_once('='))
            .find_map(|(name, value)| (name == key).then_some(value))
            .filter(|value| !value.is_empty());
        Ok(found.map(str::to_owned))
    }

    /// The pod's name from `CNI_ARGS`, where both halves of it are there.
    pub(crate) fn pod(&self) -> Result<Option<PodName>, EnvironmentError> {
        let value = |key: &'static str, is_name: fn(&str) -> bool| {
            let found = self.argument(key)?;
            #[cfg(feature = "fuzzing")]
            ferrule_model::planted::bug(
                "cni-environment",
                [
                    key == "K8S_POD_NAME",
                    found.as_ref().is_some_and(|name| name.len() > 8),
                    found.as_ref().is_some_and(|name| name.starts_with('-')),
                ],
            );
            match found {
                Some(value) if !is_name(&value) => Err(EnvironmentError::PodName {
                    key,
                    value: shortened(&value),
                }),
                found => Ok(found),
            }
        };
        let namespace = value("K8S_POD_NAMESPACE", is_namespace)?;
        let name = value("K8S_POD_NAME", is_pod_name)?;
        Ok(namespace
            .zip(name)
            .map(|(namespace, name)| PodName { namespace, name }))
    }
}

/// Kubernetes bounds a subdomain as a whole, and not its labels.
fn is_pod_name(text: &str) -> bool {
    text.len() <= MAX_POD_NAME && text.split('.').all(is_label)
}

fn is_namespace(text: &str) -> bool {
    text.len() <= MAX_NAMESPACE && is_label(text)
}

/// Small letters, digits and `-`, which neither begins nor ends it.
fn is_label(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    !text.is_empty() && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// Untrusted text for a message.
pub(crate) fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<'a>(
        pairs: &'a [(&'static str, &'a str)],
    ) -> Environment<impl Fn(&'static str) -> Option<OsString> + 'a> {
        Environment(move |variable| {
            pairs
                .iter()
                .find_map(|(name, value)| (*name == variable).then(|| (*value).into()))
        })
    }

    #[test]
    fn verbs() {
        assert_eq!(with(&[]).command().unwrap(), None);
        assert_eq!(
            with(&[("CNI_COMMAND", "ADD")]).command().unwrap(),
            Some(Command::Add)
        );
        let error = with(&[("CNI_COMMAND", "FROB")]).command().unwrap_err();
        assert!(error.to_string().contains("CNI_COMMAND is \"FROB\""));
        assert!(with(&[("CNI_COMMAND", "add")]).command().is_err());
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let said =
            |pairs: &[(&'static str, &str)]| with(pairs).attachment().unwrap_err().to_string();
        assert!(said(&[]).contains("CNI_CONTAINERID"));
        assert!(said(&[("CNI_CONTAINERID", "")]).contains("CNI_CONTAINERID"));
        assert!(said(&[("CNI_CONTAINERID", "a")]).contains("CNI_IFNAME"));
        let slash = [("CNI_CONTAINERID", "a"), ("CNI_IFNAME", "eth0/../../x")];
        assert!(said(&slash).contains("CNI_IFNAME"));
        assert!(
            with(&[])
                .netns()
                .unwrap_err()
                .to_string()
                .contains("CNI_NETNS")
        );
        assert!(with(&[("CNI_NETNS", "proc/1/ns/net")]).netns().is_err());
        let upper = [("CNI_CONTAINERID", "ABC.d_e-f"), ("CNI_IFNAME", "eth0")];
        assert!(with(&upper).attachment().is_ok());
    }

    #[test]
    fn pod_names() {
        let pod = |text| with(&[("CNI_ARGS", text)]).pod();
        let full = "IgnoreUnknown=1;K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=a.b-1;X";
        assert_eq!(
            pod(full).unwrap(),
            Some(PodName {
                namespace: "kube-system".to_owned(),
                name: "a.b-1".to_owned()
            })
        );
        assert_eq!(pod("K8S_POD_NAME=a").unwrap(), None);
        assert_eq!(pod("").unwrap(), None);
        let named = |namespace: &str, name: &str| {
            let text = format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}");
            with(&[("CNI_ARGS", &text)]).pod()
        };
        let long = "a".repeat(64);
        for name in [
            "a\nb", "A", "..", ".", "-", "a-", "-a", "a..b", "a.-b", ".a", "a.",
        ] {
            let error = named("c", name).unwrap_err().to_string();
            assert!(error.contains("K8S_POD_NAME is"), "{error}");
        }
        for namespace in ["..", "-", "a.b", &long, &"a".repeat(253)] {
            let error = named(namespace, "b").unwrap_err().to_string();
            assert!(error.contains("K8S_POD_NAMESPACE is"), "{error}");
        }
        assert!(named(&long[..63], &format!("{long}.b-1.{long}")).is_ok());
        assert!(named("c", &"a".repeat(254)).is_err());
    }
}
