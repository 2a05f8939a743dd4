"""The model that `demo` names: its files lie beside this one."""
