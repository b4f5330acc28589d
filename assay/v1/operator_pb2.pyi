from assay.v1 import agent_pb2 as _agent_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReadRequest(_message.Message):
    __slots__ = ("kind", "id")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    kind: str
    id: str
    def __init__(self, kind: _Optional[str] = ..., id: _Optional[str] = ...) -> None: ...

class Document(_message.Message):
    __slots__ = ("schema", "json")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    schema: str
    json: str
    def __init__(self, schema: _Optional[str] = ..., json: _Optional[str] = ...) -> None: ...

class Change(_message.Message):
    __slots__ = ("actor", "reason", "idempotency_key")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    actor: str
    reason: str
    idempotency_key: str
    def __init__(self, actor: _Optional[str] = ..., reason: _Optional[str] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class SubmitJobRequest(_message.Message):
    __slots__ = ("change", "spec", "drills")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    DRILLS_FIELD_NUMBER: _ClassVar[int]
    change: Change
    spec: str
    drills: _containers.RepeatedCompositeFieldContainer[_agent_pb2.Drill]
    def __init__(self, change: _Optional[_Union[Change, _Mapping]] = ..., spec: _Optional[str] = ..., drills: _Optional[_Iterable[_Union[_agent_pb2.Drill, _Mapping]]] = ...) -> None: ...

class InjectDrillRequest(_message.Message):
    __slots__ = ("change", "job", "drill")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    DRILL_FIELD_NUMBER: _ClassVar[int]
    change: Change
    job: str
    drill: _agent_pb2.Drill
    def __init__(self, change: _Optional[_Union[Change, _Mapping]] = ..., job: _Optional[str] = ..., drill: _Optional[_Union[_agent_pb2.Drill, _Mapping]] = ...) -> None: ...

class CancelJobRequest(_message.Message):
    __slots__ = ("change", "job")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    change: Change
    job: str
    def __init__(self, change: _Optional[_Union[Change, _Mapping]] = ..., job: _Optional[str] = ...) -> None: ...

class ChangeReply(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...
