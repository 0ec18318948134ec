"""The SimPO trainer."""
